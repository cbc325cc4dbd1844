"""`dinoreg plan`: what a run will cost before it starts."""

from dinoreg.commands.options import PlanOptions
from dinoreg.config.schema import Config
from dinoreg.plan import plan
from dinoreg.plan.text import show


def plan_command(config: Config, options: PlanOptions) -> None:
    """Print the plan, and write every figure to `out` where it is given."""
    values = dict(vars(options))
    out = values.pop("out")
    planned = plan(config, **values)
    written = None if out is None else planned.write(out)
    show(planned)
    if written is not None:
        print(f"plan: {written}")
