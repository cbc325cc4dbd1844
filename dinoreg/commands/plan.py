"""`dinoreg plan`: the cost of a run before it starts."""

from dinoreg.config.plan_options import PlanOptions
from dinoreg.config.schema import Config
from dinoreg.plan.run import plan


def plan_command(config: Config, options: PlanOptions) -> None:
    """Print the plan of a run, and with options.out write every figure there; UserError as `plan`."""
    plan(config, **vars(options)).show()
    if options.out is not None:
        print(f"plan: {options.out}")
