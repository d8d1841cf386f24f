"""What a model hub takes: the model card of a saved folder, and the upload of the folder."""

import json
import logging
import os
import re
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

CARD_FILE = "README.md"
_GENERATED = "<!-- This card was generated with the files beside it. -->"


def write_card(
    folder: str | os.PathLike,
    *,
    kind: str,
    base_model: str,
    facts: dict[str, Any],
    load: str,
    library: str,
    notes: tuple[str, ...] = (),
    beside: str | os.PathLike | None = None,
) -> None:
    """Write README.md, the model card, into a folder; a card that somebody wrote or changed is left as it is.

    Args:
        kind: what the folder holds, in a few words.   base_model: its name or path, or "".
        facts: rows of the card's table.   load: the Python code that loads the folder.
        library: which loads it, as hubs name it.   notes: paragraphs.
        beside: where the folder's files go in the end, if not where they are: its card is the one that stays.
    """
    path = Path(folder) / CARD_FILE
    present = Path(beside if beside is not None else folder) / CARD_FILE
    if present.is_file() and _GENERATED not in present.read_text(encoding="utf-8"):
        logger.info("%s is not a generated card and stays as it is", present)
        return
    header = [f"library_name: {library}", "tags:", "- hylorada"]
    if _is_hub_id(base_model):
        header.insert(0, f"base_model: {json.dumps(base_model)}")
    rows = {"Base model": f"`{base_model}`" if base_model else "not recorded"} | facts
    lines = ["---", *header, "---", "", _GENERATED, "", f"# {kind[0].upper()}{kind[1:]}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += ["", "```python", load, "```"]
    for note in notes:
        lines += ["", note]
    lines += [
        "",
        "The licence of the base model applies to what is made of it; the adapter's own is for its author to say.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def upload(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload a HyLoRADA model",
) -> str:
    """Upload a folder to a repository of a model hub, which is made where it does not exist. -> the commit's address.

    Raises:
        ValueError: no repository's name.   OSError: the hub could not be reached, or it refused.
    """
    if not isinstance(repo_id, str) or not _is_hub_id(repo_id):
        raise ValueError(f'repo_id must be "name" or "owner/name", got {repo_id!r}')
    import huggingface_hub

    try:
        api = huggingface_hub.HfApi(token=token)
        repository = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repository, folder_path=str(folder), commit_message=commit_message, revision=revision
        )
    # which errors a network has is the hub client's transport library's matter, another one in each of its releases
    except Exception as error:
        raise OSError(
            f"cannot upload to {repo_id!r}: {type(error).__name__}: {error}; log in with `hf auth login` where a hub "
            "can be reached, or call save_pretrained(directory) and upload the folder from there"
        ) from error
    return str(commit.commit_url)


def _is_hub_id(name: str) -> bool:
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name) is not None and not os.path.exists(name)
