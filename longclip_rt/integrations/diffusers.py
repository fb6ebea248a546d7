"""A bundle as the text encoder of Stable Diffusion and SDXL: prompts of 248 tokens in place of 77.

    encoder = LongClipTextEncoder(embedder)
    pipe.register_modules(text_encoder=encoder, tokenizer=encoder.tokenizer())

or, for whatever takes embeddings of prompts, `pipe(**prompt_embeds(embedder, [prompt]))`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from longclip_rt.backends.graph_weights import weights_of
from longclip_rt.bundle.bundle import TOKENIZER, Bundle, load_bundle
from longclip_rt.errors import BundleError, InputError
from longclip_rt.model.tokenizer import pad_tokens
from longclip_rt.runtime import Embedder
from longclip_rt.system.extras import require
from longclip_rt.weights.convert import END_NAME, START_NAME, huggingface_config, with_openai_names

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = require("torch", "diffusers")

logger = logging.getLogger("longclip_rt")

_LAST = "last_hidden_state"


class HiddenStates(Sequence["Tensor"]):
    """The blocks' input and outputs [B, S, W] as far as the bundle has them; -1 is the last block's.

    Args:
        named: The bundle's outputs by name.
        count: How many there are: one more than blocks.
        bundle: For errors.
        shifted: Gives for -N what N - 1 blocks before the last one came out, after the final norm; else None.
    """

    def __init__(self, named: Mapping[str, Tensor], count: int, bundle: Bundle, shifted: Any = None) -> None:
        self._named, self._count, self._bundle, self._shifted = named, count, bundle, shifted

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        least = 1 if self._shifted is None else 2
        return (self[-behind] for behind in range(self._count + least - 1, least - 1, -1))

    def __getitem__(self, index: Any) -> Any:
        """One state.

        Raises:
            InputError: There is none so far back: `clip_skip` is too large.
            BundleError: The bundle was exported without it.
        """
        behind = -index if index < 0 else self._count - index
        least = 1 if self._shifted is None else 2
        if not least <= behind <= self._count + least - 1:
            raise InputError(
                f"The text encoder has {self._count - 1} blocks, and hidden_states[{index}] was asked for. Take a "
                "smaller clip_skip."
            )
        if self._shifted is None:
            return _output(self._named, f"hidden_states.-{behind}", self._bundle)
        if behind == 2:
            return _output(self._named, _LAST, self._bundle)
        return self._shifted(_output(self._named, f"hidden_states.-{behind - 1}", self._bundle))


class TextStates:
    """What `CLIPTextModel` of transformers returns, as far as pipelines read it.

    Each is looked up when it is read, and an error then names the command that adds it to the bundle.
    """

    def __init__(self, named: Mapping[str, Tensor], hidden: HiddenStates, bundle: Bundle, projection: Any) -> None:
        self._named, self._bundle, self._projection = named, bundle, projection
        self.hidden_states = hidden

    @property
    def last_hidden_state(self) -> Tensor:
        """[B, S, W], after the final norm."""
        return _output(self._named, _LAST, self._bundle)

    @property
    def pooler_output(self) -> Tensor:
        """[B, W]: the end token after the final norm, not projected."""
        return _output(self._named, "pooler_output", self._bundle)

    @property
    def text_embeds(self) -> Tensor:
        """[B, D]: projected, not normalised."""
        projected: Tensor = self.pooler_output @ self._projection
        return projected

    def __getitem__(self, index: int) -> Any:
        """0: the states, or the projected vector with a projection; -1: the hidden states."""
        if index in (-1, 2):
            return self.hidden_states
        if index == 0:
            return self.last_hidden_state if self._projection is None else self.text_embeds
        if index == 1:
            return self.pooler_output if self._projection is None else self.last_hidden_state
        raise IndexError(f"The outputs are 0, 1 and 2; got {index}.")


class LongClipTextEncoder(torch.nn.Module):
    """A text encoder in the place of a pipeline's `text_encoder`, or, with a projection, `text_encoder_2`.

    The bundle's backend computes the states; what is returned lies on this module's device, in its dtype. It has no
    weights but the final norm, so `save_pretrained` and LoRA find nothing in it.

    Args:
        embedder: Its bundle was exported with `--output-name` for each state that the pipeline reads.
        with_projection: Whether this is SDXL's second encoder, of which the projected vector is read too.
        last_for_sdxl: Gives SDXL the last block after the final norm, as Long-CLIP's own SDXL program does, in the
            place of the block before it without the norm, as SDXL was trained. `clip_skip` then counts from there.

    Attributes:
        config: A `CLIPTextConfig` of transformers.

    Raises:
        MissingExtraError: PyTorch, transformers or onnx is not installed.
        BackendError: The final norm cannot be read from the bundle's graph.
    """

    def __init__(self, embedder: Embedder, *, with_projection: bool = False, last_for_sdxl: bool = False) -> None:
        super().__init__()
        self.embedder, self.last_for_sdxl = embedder, last_for_sdxl
        architecture = embedder.bundle.architecture
        options = huggingface_config(architecture)["text_config"]
        self.config: Any = require("transformers", "diffusers").CLIPTextConfig(**options)
        self.text_model = torch.nn.Module()
        head = _head(str(embedder.bundle.path), embedder.bundle.sha256)
        norm = torch.nn.LayerNorm(architecture.text_width, eps=self.config.layer_norm_eps)
        norm.load_state_dict({"weight": head["ln_final.weight"], "bias": head["ln_final.bias"]})
        self.text_model.final_layer_norm = norm
        self.register_buffer("projection", head["text_projection"].clone() if with_projection else None)
        self.requires_grad_(False)

    @property
    def dtype(self) -> torch.dtype:
        """What states are returned in."""
        weight: Tensor = self._norm.weight
        return weight.dtype

    @property
    def device(self) -> torch.device:
        """Where states are returned."""
        weight: Tensor = self._norm.weight
        return weight.device

    @property
    def _norm(self) -> torch.nn.LayerNorm:
        norm: Any = self.text_model.final_layer_norm
        return norm  # type: ignore[no-any-return]

    def tokenizer(self, pad_id: int | None = None) -> Any:
        """A `PreTrainedTokenizerFast` of transformers that pads and cuts to the bundle's 248 tokens.

        Args:
            pad_id: What it pads with; None: the end token, as the tokenizers of pipelines do. Long-CLIP's own is 0.

        Raises:
            MissingExtraError: transformers is not installed.
        """
        tokenizers, transformers = require("tokenizers", "diffusers"), require("transformers", "diffusers")
        description = self.embedder.bundle.file(TOKENIZER).read_text(encoding="utf-8")
        rust = tokenizers.Tokenizer.from_str(with_openai_names(description))
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=rust,
            model_max_length=self.embedder.context_length,
            bos_token=START_NAME,
            eos_token=END_NAME,
            unk_token=END_NAME,
            pad_token=END_NAME if pad_id is None else rust.id_to_token(pad_id),
        )

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> TextStates:
        """Encodes prompts.

        Args:
            input_ids: Token ids [B, S], 1 <= S <= 248, on any device; not trimmed, for the padding counts.
            attention_mask: Not used, as by CLIP's pipelines: attention is causal.
            output_hidden_states: Not used: they are there where the bundle has them.
            kwargs: Likewise, such as `return_dict`.

        Raises:
            BackendError: The ids are not the model's.
        """
        bundle = self.embedder.bundle
        names = [name for name in bundle.outputs("text") if name.startswith("hidden_states") or name in _READ]
        ids = input_ids.cpu().numpy().astype(np.int32)
        arrays = self.embedder.backend.run("text", ids, names) if names else []
        named = {
            name: torch.from_numpy(array).to(self.device, self.dtype) for name, array in zip(names, arrays, strict=True)
        }
        count = bundle.architecture.text_layers + 1
        hidden = HiddenStates(named, count, bundle, self._norm if self.last_for_sdxl else None)
        return TextStates(named, hidden, bundle, self.projection)


_READ = (_LAST, "pooler_output")


def prompt_embeds(
    embedder: Embedder,
    prompts: Sequence[str],
    negative_prompts: Sequence[str] | None = None,
    *,
    second: Embedder | None = None,
    clip_skip: int | None = None,
    last_for_sdxl: bool = False,
    pad_id: int | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Embeddings of prompts, to be handed to a pipeline: `pipe(**prompt_embeds(...))`.

    Texts are cleaned as the model was trained, and cut to 248 tokens with a warning in the log.

    Args:
        embedder: The encoder of Stable Diffusion 1.x and 2.x, or SDXL's first one.
        prompts: One for each picture.
        negative_prompts: As many; None: empty texts, or zeros for SDXL, as its pipeline does.
        second: SDXL's second encoder.
        clip_skip: Blocks to leave out from the end, of prompts and, as in the pipelines, not of negative prompts.
        last_for_sdxl: As for `LongClipTextEncoder`.
        pad_id: As for `LongClipTextEncoder.tokenizer`.
        device: Where the tensors go.
        dtype: Their type; None: float32.

    Returns:
        `prompt_embeds` and `negative_prompt_embeds` [B, 248, W], W being the sum of both widths with `second`; then
        also `pooled_prompt_embeds` and `negative_pooled_prompt_embeds` [B, D].

    Raises:
        BundleError: A bundle lacks a state; the message names the command that adds it.
        InputError: `clip_skip` is larger than the model is deep, or the lists differ in length.
    """
    if isinstance(prompts, str) or isinstance(negative_prompts, str):
        raise InputError("prompt_embeds takes lists of prompts; got one text. Write [prompt].")
    if negative_prompts is not None and len(negative_prompts) != len(prompts):
        raise InputError(f"There are {len(prompts)} prompts and {len(negative_prompts)} negative ones; give as many.")
    if second is not None and second.context_length != embedder.context_length:
        raise InputError(
            f"The encoders read {embedder.context_length} and {second.context_length} tokens; SDXL takes both side by "
            "side. Export both with 248."
        )
    encoders = [LongClipTextEncoder(embedder, last_for_sdxl=last_for_sdxl and second is not None)]
    if second is not None:
        encoders.append(LongClipTextEncoder(second, with_projection=True, last_for_sdxl=last_for_sdxl))

    def encoded(texts: Sequence[str], skip: int | None) -> list[Tensor]:
        """The states side by side and, with SDXL, the pooled vector."""
        states = [encoder(_ids(encoder.embedder, texts, pad_id)) for encoder in encoders]
        if second is not None:
            return [torch.cat([one.hidden_states[-2 - (skip or 0)] for one in states], dim=-1), states[1][0]]
        if skip is None:
            return [states[0][0]]
        return [encoders[0].text_model.final_layer_norm(states[0].hidden_states[-1 - skip])]  # type: ignore[operator]

    if clip_skip is not None and clip_skip < 0:
        raise InputError(f"clip_skip is {clip_skip}; expected 0 or more.")
    wanted = encoded(prompts, clip_skip)
    if negative_prompts is None and second is not None:
        unwanted = [torch.zeros_like(tensor) for tensor in wanted]
    else:
        unwanted = encoded([""] * len(prompts) if negative_prompts is None else negative_prompts, None)
    names = ("prompt_embeds", "pooled_prompt_embeds"), ("negative_prompt_embeds", "negative_pooled_prompt_embeds")
    pairs = [*zip(names[0], wanted, strict=False), *zip(names[1], unwanted, strict=False)]
    return {name: tensor.to(device, dtype) for name, tensor in pairs}


def _ids(embedder: Embedder, texts: Sequence[str], pad_id: int | None) -> Tensor:
    """Token ids int32 [B, 248]."""
    encoded = embedder.tokenizer.encode(texts)
    if cut := sum(tokens.truncated for tokens in encoded):
        logger.warning("%d of %d prompts were cut to %d tokens", cut, len(encoded), embedder.context_length)
    pad = embedder.tokenizer.eot if pad_id is None else pad_id
    return torch.from_numpy(pad_tokens([tokens.ids for tokens in encoded], embedder.context_length, pad))


@functools.lru_cache(maxsize=4)
def _head(path: str, sha256: str) -> dict[str, Tensor]:
    """The final norm and the projection [W, D] of a bundle's text graph, which is hundreds of MiB to read."""
    weights = weights_of(load_bundle(Path(path), verify=False), ("text",), "diffusers")
    return {name: torch.from_numpy(weights[name]) for name in ("ln_final.weight", "ln_final.bias", "text_projection")}


def _output(named: Mapping[str, Tensor], name: str, bundle: Bundle) -> Tensor:
    if name not in named:
        kept = [each for each in bundle.outputs("text") if each not in ("text_embeds", "text_pca")]
        flags = " ".join(f"--output-name text:{each}" for each in [*kept, name])
        raise BundleError(
            f"The bundle {bundle.path} was exported without the text encoder's {name}, which the pipeline needs. Add "
            f"it with: longclip-rt export --weights {bundle.manifest['source']['weights']} {flags}"
        )
    return named[name]
