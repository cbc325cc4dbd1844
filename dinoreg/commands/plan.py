"""`dinoreg plan`: what a run will cost before it starts."""

from dinoreg.commands.arguments import read_options, source_and_overrides
from dinoreg.config.load import Config, load_config
from dinoreg.config.option import split_texts
from dinoreg.config.plan_options import PlanOptions


def read_plan(arguments: list[str]) -> tuple[Config, PlanOptions]:
    """The config that is planned, with its overrides, and the plan's own keys."""
    own, rest = split_texts(PlanOptions, arguments)
    source, overrides = source_and_overrides("plan", rest)
    return load_config(source, overrides), read_options(PlanOptions, own)[1]


def run_plan(config: Config, options: PlanOptions) -> None:
    """Print the plan, and write every figure to `out` where it is given."""
    from dinoreg.plan import plan
    from dinoreg.plan.text import show

    found = plan(config, **vars(options))
    if options.out is not None:
        found.write(options.out)
    show(found)
    if options.out is not None:
        print(f"plan: {options.out}")
