"""What the fp32 torch towers give on the gate's sample, and how large the numbers inside them become."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from longclip_rt.export.precision import ActivationRecorder, BlockActivation
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.model.towers import ImageTower, TextTower
from longclip_rt.parity.limits import Reference, Sample


def reference_from_towers(
    text: TextTower, image: ImageTower, sample: Sample, step: Callable[[int], None] = lambda count: None
) -> tuple[Reference, tuple[BlockActivation, ...]]:
    """Runs the fp32 towers over the sample and measures the activations inside every block on the way.

    Args:
        text: The text tower, in fp32, with the outputs that are exported.
        image: The image tower, likewise.
        sample: The inputs.
        step: Called with the number of inputs done after each batch.

    Returns:
        What the towers give, and the largest activation of each block of each tower.
    """
    context = text.architecture.context_length
    recorders = [ActivationRecorder(text), ActivationRecorder(image)]
    outputs = {}
    with torch.inference_mode():
        for tower, recorder, inputs in (
            (text, recorders[0], pad_tokens(sample.tokens, context)),
            (image, recorders[1], sample.pixels),
        ):
            batches = []
            with recorder.record():
                for start in range(0, len(inputs), 4):
                    batch = torch.from_numpy(inputs[start : start + 4])
                    batches.append([output.numpy() for output in tower(batch)])
                    step(len(batch))
            joined = [np.concatenate(parts) for parts in zip(*batches, strict=True)]
            outputs["text" if tower is text else "image"] = dict(zip(tower.outputs, joined, strict=True))
    return Reference(outputs), tuple(entry for recorder in recorders for entry in recorder.activations())
