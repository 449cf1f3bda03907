"""Logit lens: the tokens that neurons and directions promote through the unembedding."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.depass import DePass
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.norms import FrozenNorm, NormParameters
from depass_lightning.engine.record import record
from depass_lightning.errors import DePassError
from depass_lightning.models.affine import device_of
from depass_lightning.models.decoder import Decoder
from depass_lightning.results.attribution import Attribution
from depass_lightning.results.circuit import Circuit
from depass_lightning.results.component import Component
from depass_lightning.sources import Source, Subspace

LAYER_RULES = ("softmax", "max", "relu", "linear", "half", "taylor")  # those that are propagated forward
LAYER_BYTES = 2**30  # of all tokens' states at one layer, at most
TOLERANCE = 1e-2  # between the last layer's row and the scores, of the largest
CHUNK = 64  # directions whose logits over the whole vocabulary are in memory together


def promoted_tokens(
    depass: DePass, directions: Float[Tensor, "direction hidden"], count: int = 5
) -> list[tuple[list[str], list[str]]]:
    """Return the tokens that directions promote, through the final norm's weights and the unembedding.

    As in Geva et al. (2022, arXiv 2203.14680, section 3): what the direction alone adds to each logit,
    without the blocks in between.

    Args:
        depass: the model, with its tokenizer.
        directions: `[direction, hidden]` of any length.
        count: the number of tokens at each end.

    Returns:
        For each direction the tokens whose logits it raises most, and those whose logits it lowers most.

    Raises:
        DePassError: the directions do not have the model's hidden size.
    """
    decoder = depass.decoder
    if directions.ndim != 2 or directions.shape[1] != decoder.hidden_size:
        raise DePassError(
            f"directions of shape {tuple(directions.shape)} cannot be read by a model whose states have "
            f"{decoder.hidden_size} numbers; give [direction, {decoder.hidden_size}]"
        )
    with torch.no_grad():
        unembedding = decoder.unembedded().weight
        norm = _norm(decoder, decoder.final_norm, decoder.blocks[-1].attention.module)
        tokens = []
        # With a device map the norm and the unembedding may be on different devices.
        for chunk in directions.to(norm.weight.device, decoder.dtype).split(CHUNK):
            logits = norm.direction(chunk).to(unembedding) @ unembedding.T  # direction, vocabulary
            # Twice the count: a word with and without its space is shown once.
            ends = [logits.topk(min(2 * count, logits.shape[1]), largest=up).indices for up in (True, False)]
            tokens += zip(*(end.tolist() for end in ends), strict=True)
    return [(_words(depass, up, count), _words(depass, down, count)) for up, down in tokens]


def next_tokens(depass: DePass, ids: Sequence[int], count: int = 5) -> list[list[dict[str, Any]]]:
    """Return the model's most likely next tokens at every position of a prompt.

    Args:
        depass: the model.
        ids: the prompt's token ids.
        count: the number of tokens at each position.

    Returns:
        `[position][rank]`, each token's `id`, `text` and `probability`.

    Raises:
        DePassError: the model's values are not finite.
    """
    decoder = depass.decoder
    names = OutputNames.of(decoder, depass.tokenizer)
    row = torch.tensor([list(ids)], device=decoder.device)
    lengths = torch.tensor([len(ids)], device=decoder.device)
    with alone(decoder.model):
        everywhere = torch.arange(len(ids), device=decoder.device)
        recording = record(decoder, row, lengths, everywhere, keep_everything=False)
    likely = []
    for logits in recording.logits[0]:  # one position after another: the vocabulary may be large
        top = logits.double().softmax(-1).topk(min(count, len(logits)))
        likely.append(
            [
                {"id": token, "text": names.text_of(token), "probability": probability}
                for probability, token in zip(top.values.tolist(), top.indices.tolist(), strict=True)
            ]
        )
    return likely


@torch.no_grad()
def layer_scores(depass: DePass, attribution: Attribution) -> Float[Tensor, "layer position"] | None:
    """Return each token's part of the target's logit at every layer, as if it were read there.

    The components of the tokens are read at the target's position through the final norm, with the scale
    that it has for the state at that layer, and the unembedding. The last row is the tokens' scores.

    Args:
        depass: the model.
        attribution: scores of tokens, or of spans of them, for a token's logit or the difference of two.

    Returns:
        One row for each block's input and one for the last block's output; None for other models, targets,
        sources and methods, for rules that are not propagated forward (`shap`, `dual`, rule files), and for
        prompts whose tokens' states at all positions exceed 1 GiB, about 680 tokens of a hidden size of 576.
        None also where the last row differs from the scores: a competing rule splits spans in another way
        than tokens, and `Tokens(exclude_first=False)` lets the first token compete.
    """
    ids, position, decoder = attribution.target_ids, attribution.position, depass.decoder
    names = OutputNames.of(decoder, depass.tokenizer)
    plain = attribution.target == " − ".join(repr(names.text_of(token)) for token in ids)
    from_tokens = attribution.layer == 0 and any(span is not None for span in attribution.positions)
    forward = attribution.method == "depass" and attribution.attention_path == "content"
    forward = forward and attribution.rule in LAYER_RULES and "compat" not in attribution.metadata
    answers = attribution.answer_start is not None or decoder.head.kind != "causal"
    large = (position + 1) ** 2 * decoder.hidden_size * decoder.dtype.itemsize > LAYER_BYTES
    if not (ids and plain and from_tokens and forward) or answers or large:
        return None
    options: dict[str, Any] = {"rule": attribution.rule}
    if attribution.metadata.get("temperature") is not None:
        options["temperature"] = attribution.metadata["temperature"]
    norm = _norm(decoder, decoder.final_norm, decoder.blocks[-1].attention.module)
    tokens = torch.tensor(ids, device=decoder.device)
    weights = torch.tensor([[1.0, *[-1.0] * (len(ids) - 1)]], device=decoder.device)
    vector = decoder.summed_readout(tokens, weights)[0][0].to(decoder.dtype)
    row = torch.tensor([attribution.token_ids[: position + 1]])
    rows = []
    for layer in depass.decompose_layers(input_ids=row, **options):
        spans = [component.span is not None for component in layer.components]
        states = layer.states[:, position].to(norm.weight)  # [component, hidden]
        scale = states.new_ones(1, 1)
        if decoder.final_norm is not None:
            total = states.sum(0)[None, None]
            normed = decoder.final_norm(total.to(decoder.model_dtype))
            scale = FrozenNorm.fit(norm, total, normed, "the final norm").scale
        rows.append((norm.direction(states) * scale[0] @ vector.to(states))[spans].cpu())
    scores = torch.stack(rows)
    if not _sums_to(scores[-1], attribution):
        return None
    return scores


def _sums_to(tokens: Float[Tensor, "position"], attribution: Attribution) -> bool:
    """Return whether tokens' scores, summed over each component's tokens, are the attribution's."""
    pairs = zip(attribution.positions, attribution.scores.tolist(), strict=True)
    summed = [(float(tokens[slice(*span)].sum()), score) for span, score in pairs if span is not None]
    largest = max(abs(total) for total, _ in summed)
    return all(abs(total - score) <= TOLERANCE * largest for total, score in summed)


def notes_on(depass: DePass, source: Source, components: Sequence[Component]) -> dict[str, str]:
    """Describe which tokens neurons and single directions promote.

    Args:
        depass: the model, with its tokenizer.
        source: what the state was split into.
        components: the components of it to read; other kinds than neurons and single directions are ignored.

    Returns:
        A note for each component that was read, by its label.
    """
    decoder = depass.decoder
    bases = source.bases if isinstance(source, Subspace) else []
    directions: dict[str, Tensor] = {}
    for component in components:
        layer, index = component.layer, component.index
        if component.kind == "neuron" and layer is not None and index is not None:
            mlp = decoder.blocks[layer].mlp
            column = mlp.column(index, decoder.dtype)
            norm = _norm(decoder, mlp.post_norm, decoder.blocks[layer].attention.module)
            directions[component.label] = norm.direction(column)
        elif component.kind == "subspace" and index is not None and len(bases[index]) == 1:
            directions[component.label] = bases[index][0]
    return _notes(depass, directions)


@dataclass(frozen=True)
class PageLens:
    """What a run's page shows of the model itself.

    Attributes:
        depass: the model, with its tokenizer.
        source: what the run's states were split into.
    """

    depass: DePass
    source: Source

    def notes(self, components: Sequence[Component]) -> dict[str, str]:
        """Return what `notes_on` does."""
        return notes_on(self.depass, self.source, components)

    def prompt(self, attribution: Attribution) -> dict[str, Any]:
        """Return one prompt's `likely` next tokens, and the `layers` of its tokens' scores, if any."""
        if self.depass.decoder.head.kind != "causal":
            return {"likely": None, "layers": None}
        scores = layer_scores(self.depass, attribution)
        return {
            "likely": next_tokens(self.depass, attribution.token_ids[: attribution.position + 1]),
            "layers": None if scores is None else scores.tolist(),
        }


def describe_nodes(depass: DePass, circuit: Circuit, edges: int = 60) -> Circuit:
    """Return a circuit with the tokens that its heads and MLPs promote, and its heads' attention.

    What a node writes at its position, or else at the target's, is read through the unembedding.

    Args:
        depass: the model, with its tokenizer.
        circuit: the circuit of one prompt.
        edges: how many of the largest edges have their nodes described.
    """
    decoder, place = depass.decoder, circuit.position
    ids = torch.tensor([circuit.token_ids[: place + 1]], device=decoder.device)
    nodes = [node for node in circuit.prune(edges=edges).nodes if node.kind in ("head", "mlp")]
    states: dict[str, Tensor] = {}
    patterns: dict[str, list[list[float]]] = {}
    with alone(decoder.model):
        lengths = torch.tensor([place + 1], device=decoder.device)
        recording = record(decoder, ids, lengths, lengths - 1)
        blocks = {node.layer: recording.block(node.layer) for node in nodes if node.layer is not None}
        for node in nodes:
            assert node.layer is not None
            block, position = blocks[node.layer], place if node.span is None else node.span[0]
            if node.kind == "mlp":
                states[node.label] = block.mlp_output[0, position]
                continue
            values, _ = block.attention.head_values(block.resid_pre)
            states[node.label] = block.attention.head_outputs(values)[0, node.index or 0, position]
            if block.attention.has_scores:
                weights = block.attention.probabilities[0, node.index or 0]  # [query, key]
                weights = weights / weights.sum(-1, keepdim=True)
                patterns[node.label] = [[round(float(weight), 3) for weight in row] for row in weights]
    return replace(circuit, notes=_notes(depass, states), patterns=patterns)


def _notes(depass: DePass, directions: Mapping[str, Tensor]) -> dict[str, str]:
    """Return what each labelled direction promotes and demotes, in words."""
    if not directions:
        return {}
    rows = torch.stack([row.to(depass.decoder.device, depass.decoder.dtype) for row in directions.values()])
    return {
        label: f"promotes {', '.join(up)}; demotes {', '.join(down)}"
        for label, (up, down) in zip(directions, promoted_tokens(depass, rows), strict=True)
    }


def _norm(decoder: Decoder, norm: nn.Module | None, near: nn.Module) -> NormParameters:
    """Return what a norm does besides scaling, or the identity where there is no norm."""
    if norm is None:
        return NormParameters.nothing(decoder.hidden_size, device_of(near), decoder.dtype)
    return NormParameters.of(norm, near, decoder.hidden_size, decoder.model_dtype, decoder.dtype)


def _words(depass: DePass, tokens: Sequence[int], count: int) -> list[str]:
    names = OutputNames.of(depass.decoder, depass.tokenizer)
    texts = [names.text_of(token) for token in tokens]
    return list(dict.fromkeys(text.strip() or text for text in texts))[:count]
