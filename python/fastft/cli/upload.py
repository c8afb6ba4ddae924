"""`fastft upload`."""

from pathlib import Path
from typing import Literal

from fastft import console
from fastft.cli.job import Job


def upload(
    folder: str,
    repository: str,
    *,
    hub: Literal["huggingface", "modelscope"] = "huggingface",
    private: bool = False,
    revision: str | None = None,
    base: str | None = None,
    message: str = "Upload with fastft",
    yes: bool = False,
) -> Job:
    """Send a result to a hub, with a card made from the run.

    Without --yes nothing is sent: the files and the card are shown. Of a run the adapter (or model) and loss.png are sent;
    checkpoints, logs, samples and the folders of this machine stay here. A folder that is not whole, holds a token, a
    pickle or a file that is no part of a model is refused. HF_TOKEN or MODELSCOPE_API_TOKEN must be allowed to write.

    Args:
        folder: a run folder, an adapter, or a model
        repository: OWNER/NAME on the hub; made if it is not there
        hub: which hub; the variable FASTFT_HUB overrides it
        private: only you see it
        revision: branch to write to; default: the main one
        base: id of the base model on the hub, for the card and the adapter
        message: of the commit
        yes: send it
    """

    def run() -> None:
        from fastft.errors import HubError
        from fastft.hub import huggingface_push, locate, modelscope_push, push

        locate.check_id(f"upload {repository}", repository)
        if "/" not in repository:
            raise HubError(f"upload {repository}: the owner is missing; give OWNER/NAME")
        asked = locate.hub(hub)
        plan = push.plan(Path(folder), repository, base=base, hub=asked)
        for line in plan.lines(repository, asked, private=private, revision=revision):
            console.result(line)
        if not yes:
            console.result(f"\n{push.CARD}:\n\n{plan.card}")
            console.note("nothing was sent; add --yes to send it")
            return
        send = modelscope_push.send if asked == "modelscope" else huggingface_push.send
        console.result(f"sent: {send(plan, repository, private=private, revision=revision, message=message)}")

    return Job(run)
