"""To Hugging Face's hub: what of a run is uploaded, and the upload.

What goes there names no folder of this machine: an adapter's base by its name on the hub, data and
folders by their last names (train/card.py).
"""

import tempfile
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from fedsieve.errors import FedSieveError
from fedsieve.run import runner


class Upload(NamedTuple):
    """What was uploaded, or would be. files: by name, with their bytes; round: that it is from;
    address: where it is now, None where nothing was uploaded.
    """

    files: dict[str, int]
    round: int
    address: str | None


def push(
    folder: Path,
    name: str,
    *,
    merge: bool = False,
    private: bool = False,
    dry_run: bool = False,
    trust_remote_code: bool = False,
    allow_code: bool = False,
    accept_changes: bool = False,
) -> Upload:
    """Upload a run's adapter, or with `merge` the whole model, to a repository of the hub, which is
    made if need be.

    dry_run: upload nothing, and ask the network nothing
    merge, trust_remote_code, allow_code, accept_changes: see `runner.export`
    Raises FedSieveError as `runner.export` does, for a name that is none, and where the hub cannot
    be reached or refuses.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FedSieveError(
            f"--push {name[:80]!r}: no repository of the hub can be called so: {error}"
        ) from None
    with tempfile.TemporaryDirectory(prefix="fedsieve-") as scratch:
        made = Path(scratch) / "upload"
        number = runner.export(
            folder,
            made,
            merge=merge,
            for_hub=True,
            trust_remote_code=trust_remote_code,
            allow_code=allow_code,
            accept_changes=accept_changes,
        )
        files = {
            path.relative_to(made).as_posix(): path.stat().st_size
            for path in sorted(made.rglob("*"))
            if path.is_file()
        }
        address = None if dry_run else _upload(made, name, private)
    return Upload(files, number, address)


def _upload(made: Path, name: str, private: bool) -> str:
    hub = HfApi()
    try:
        place = hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=place.repo_id, folder_path=made, commit_message="Adapter of FedSieve"
        )
    except Exception as error:  # of the network, of a token, of the hub: each has its own kind
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise FedSieveError(
            f"nothing could be uploaded to {name}: {first[:300]} (log in with `hf auth login`, or "
            "set HF_TOKEN to a token that may write; `--to` writes the same into a folder)"
        ) from error
    return str(place)
