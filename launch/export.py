"""An export as a job: `dinoreg launch export weights=runs/a format=onnx out=export/a`."""

from pathlib import Path

from dinoreg.commands.main import script
from dinoreg.jobs.job_type import Group, Job, Plan, Request
from dinoreg.runtime.errors import UserError


def plan(request: Request) -> Plan:
    """One job that runs `dinoreg export`; UserError for what is wrong with the request."""
    from dinoreg.checkpoint.run_folder import run_of  # here, so that help does not wait for it

    if request.source:
        raise UserError(f"launch export: {request.source}: expected key=value, as weights=RUN format=onnx out=FOLDER")
    command = ("export", *request.overrides)
    request.check(command)
    request.require_one_process("an export is made by one")
    from dinoreg.weights.resolve import find_weights

    # An export's own folder has to be new, so its records lie with the run that it comes from.
    file = find_weights(str(request.value("weights")))
    run = run_of(file) if file is not None else None
    folder = run or Path("runs") / "export" / Path(str(request.value("out"))).name
    return Plan(folder, (Group("export", (command,)),))


JOB = Job(
    name="export",
    summary="write a backbone for another library, with its certificate",
    usage="export weights=… format=timm|transformers|meta|safetensors|onnx out=FOLDER",
    plan=plan,
)

if __name__ == "__main__":
    script(JOB, "launch")
