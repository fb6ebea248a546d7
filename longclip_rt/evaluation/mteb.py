"""A bundle as a model of `mteb`, for its image and text tasks.

    import mteb
    from longclip_rt.evaluation.mteb import mteb_model

    mteb.evaluate(mteb_model("bundle"), mteb.get_tasks(tasks=["Flickr30kT2IRetrieval"]))

CLIP's R@k is mteb's `hit_rate_at_k`; its `recall_at_k` divides by the number of captions of an image. mteb turns images
to RGB before they are resized, where the reference resizes palette images as they are.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longclip_rt.metrics import unit_rows
from longclip_rt.runtime import Embedder
from longclip_rt.system.extras import require

require("mteb", "evaluate")

from mteb.models.abs_encoder import AbsEncoder  # noqa: E402
from mteb.models.model_meta import ModelMeta, ScoringFunction  # noqa: E402


class MtebModel(AbsEncoder):  # type: ignore[misc]
    """What `mteb.evaluate` takes.

    Args:
        embedder: The model, open for as long as this is used.

    Attributes:
        mteb_model_meta: Names the model, and as its revision the bundle, backend and precision.
    """

    def __init__(self, embedder: Embedder) -> None:
        self.embedder = embedder
        made_by = embedder.describe()
        revision = f"{made_by['bundle'][:12]}-{made_by['backend']}-{made_by['precision']}"
        self.mteb_model_meta = ModelMeta(
            loader=None,
            name=f"longclip-rt/{made_by['model']}",
            revision=revision,
            release_date=None,
            languages=["eng-Latn"],
            n_parameters=None,
            memory_usage_mb=None,
            max_tokens=embedder.context_length,
            embed_dim=embedder.dim,
            license=None,
            open_weights=None,
            public_training_code=None,
            public_training_data=None,
            framework=[],
            similarity_fn_name=ScoringFunction.COSINE,
            use_instructions=False,
            training_datasets=None,
            modalities=["text", "image"],
        )

    def encode(self, inputs: Any, **_task: Any) -> np.ndarray:
        """Embeds what a loader gives.

        Args:
            inputs: Batches with `text` (texts), `image` (PIL images), or both.
            _task: What mteb says of the task; no instructions are made of it.

        Returns:
            float32 [N, D], L2-normalised; the normalised sum where a row has a text and an image.
        """
        kinds = [kind for kind in ("text", "image") if kind in inputs.dataset.features]
        rows = []
        for batch in inputs:
            parts = []
            if "text" in kinds:
                parts.append(self.embedder.embed_texts(list(batch["text"])))
            if "image" in kinds:
                parts.append(self.embedder.embed_images(list(batch["image"])))
            rows.append(unit_rows(parts[0] if len(parts) == 1 else parts[0] + parts[1]))
        return np.concatenate([np.empty((0, self.embedder.dim), np.float32), *rows])


def mteb_model(bundle: str | Path | None = None, backend: str = "auto", precision: str = "auto") -> MtebModel:
    """Opens a bundle for `mteb.evaluate`; see `Embedder.from_bundle` for the arguments and errors."""
    return MtebModel(Embedder.from_bundle(bundle, backend, precision))
