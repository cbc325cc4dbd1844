"""`dinoreg plan`: the cost of a run before it starts."""

from dinoreg.config.plan_options import PlanOptions
from dinoreg.config.schema import Config
from dinoreg.plan import plan
from dinoreg.plan.text import show


def plan_command(config: Config, options: PlanOptions) -> None:
    """Print the plan of a run, and with options.out write every figure there; UserError as `plan` and `Plan.write`."""
    found = plan(config, **vars(options))
    if options.out is not None:
        found.write(options.out)
    show(found)
    if options.out is not None:
        print(f"plan: {options.out}")
