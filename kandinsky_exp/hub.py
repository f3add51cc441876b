"""Publish a result on the hub, with a card that says what it is and how to load it."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky_exp.adapters import WEIGHTS_NAME
from kandinsky_exp.errors import ConfigError
from kandinsky_exp.parts import is_hub_id

logger = logging.getLogger(__name__)
LOAD = {
    "prior": 'pipeline = DiffusionPipeline.from_pretrained("{repo}")',
    "decoder": 'pipeline = AutoPipelineForText2Image.from_pretrained("{repo}")',
}
SHOWN = ("optimizer.lr", "trainer.max_steps", "trainer.batch_size", "trainer.grad_accumulation", "data.resolution")


def check_login() -> None:
    """Raises ConfigError where nobody is logged in: better now than after the training."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise ConfigError("hub.push: nobody is logged in on the hub; run `hf auth login`, or set HF_TOKEN")


def push(result: Path, repo: str, params: Mapping[str, Any]) -> None:
    """Upload a complete result to a private repository; a failure is logged, for the local result stands.

    Args:
        result: `pipeline/` or `adapter/`.
        params: the flattened config, for the card.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        api = HfApi()
        repo = api.create_repo(repo, private=True, exist_ok=True).repo_id
        api.upload_folder(repo_id=repo, folder_path=result, commit_message="Result of kandinsky-exp")
        api.upload_file(
            repo_id=repo, path_or_fileobj=model_card(repo, params, result).encode(), path_in_repo="README.md"
        )
    except (HfHubHTTPError, OSError, ValueError) as error:
        logger.error("hub.push: %s was not uploaded to %s (%s); the local result is complete", result, repo, error)
    else:
        logger.info("uploaded to %s", repo)


def model_card(repo: str, params: Mapping[str, Any], result: Path) -> str:
    """A model card in the hub's markdown, with the code that loads the result."""
    stage = "prior" if str(params["model._target_"]).endswith("PriorStage") else "decoder"
    if result.name == "adapter":
        loading = f'network.load_lora_adapter("{repo}", weight_name="{WEIGHTS_NAME}", prefix=None)'
        code = f"# network: the base {stage}'s PriorTransformer or UNet2DConditionModel\n{loading}"
    else:
        code = f"from diffusers import AutoPipelineForText2Image, DiffusionPipeline\n\n{LOAD[stage].format(repo=repo)}"
    rows = "\n".join(f"| `{key}` | {params[key]} |" for key in SHOWN)
    base = str(params[f"weights.{stage}"])
    base_model = f"base_model: {base}\n" if is_hub_id(base) else ""  # the hub takes nothing else there
    return f"""---
{base_model}library_name: diffusers
tags: [kandinsky, text-to-image, diffusers]
---
# {repo.rpartition("/")[2]}

A Kandinsky 2.2 {stage}, fine-tuned with kandinsky-exp.

| setting | value |
| --- | --- |
{rows}

```python
{code}
```
"""
