"""One prompt's circuit: record the pass, compute all edges, and name the nodes."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, TypedDict, Unpack

from transformers import PreTrainedTokenizerBase

from depass_lightning.attribution.forward import record_batch
from depass_lightning.attribution.output_names import OutputNames
from depass_lightning.attribution.question import Question, questions_of
from depass_lightning.attribution.readout import Readout
from depass_lightning.attribution.settings import RulePath, Settings, settings_of
from depass_lightning.engine.flow import PATHS, Flow, FlowLayout, flow
from depass_lightning.engine.isolation import alone
from depass_lightning.engine.linear_rules import LinearPaths
from depass_lightning.engine.rules import RuleName, rule_named
from depass_lightning.errors import DePassError
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import IdsLike, Prompt, continued, prompts_of
from depass_lightning.results.circuit import Circuit
from depass_lightning.results.component import Component
from depass_lightning.sources import Tokens
from depass_lightning.targets import Preference, TargetLike, as_targets

Node = Literal["tokens", "embedding", "heads", "attentions", "mlps"]
NODES: tuple[Node, ...] = ("tokens", "heads", "mlps")
PLACES = (("tokens", "embedding"), ("heads", "attentions"), ("mlps",))
SHARE = 4  # readers may take this fraction, 1 / SHARE, of the memory for components


class CircuitOptions(TypedDict, total=False):
    """The keyword arguments of a call that returns a circuit."""

    nodes: Sequence[Node]
    rule: RuleName | RulePath
    score_weight: float
    corrupted: str | IdsLike | None
    by_position: bool


def circuit_of(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: Sequence[Prompt],
    target: TargetLike,
    memory_budget: int | None = None,
    **options: Unpack[CircuitOptions],
) -> Circuit:
    """Compute the edges between all nodes of exactly one prompt, with the options of `DePass.circuit`."""
    if not decoder.causal:
        raise DePassError(
            f"{type(decoder.model).__name__} is an encoder; circuits are computed for causal models only"
        )
    if len(prompts) != 1:
        raise DePassError(f"there are {len(prompts)} prompts; a circuit explains one, see Circuit.mean")
    nodes, rule = options.get("nodes", NODES), options.get("rule", "half")
    weight, corrupted = options.get("score_weight", 0.5), options.get("corrupted")
    if not isinstance(rule_named(rule, score_weight=weight), LinearPaths):
        raise DePassError(f"{rule!r} is no linear rule, which a circuit needs: half, taylor, shap or dual")
    _check_nodes(nodes)
    sources = [Tokens()]
    settings = settings_of(decoder, sources, rule=rule, score_weight=weight, memory_budget=memory_budget)
    (resolved,) = as_targets(target, None)
    if isinstance(resolved, list | Preference):
        raise DePassError("a circuit has one target; compute a circuit for each target or answer")
    ((question,),) = questions_of(decoder, tokenizer, prompts, [resolved], sources)
    pair = [question.prompt]
    if corrupted is not None:
        pair.append(_corrupted(decoder, tokenizer, corrupted, prompts[0], question.prompt))
    positions = sorted({read.position for read in question.reads})
    with alone(decoder.model):
        recordings = [record_batch(decoder, [prompt], [positions], settings) for prompt in pair]
        readout = Readout.of(recordings[0], OutputNames.of(decoder, tokenizer), [[question]])
        layout = _layout(decoder, question, settings, len(pair), options.get("by_position", False))
        state = recordings[0].final_state
        budget = settings.budget.components // SHARE
        limit = max(1, budget // (layout.positions * state.shape[-1] * state.dtype.itemsize))
        assert isinstance(settings.rule, LinearPaths)
        gradient = readout.gradient(recordings[0], 0)
        result = flow(recordings, settings.rule, gradient, readout.layer, layout, limit)
    circuit = _described(decoder, question, readout, layout, result, settings)
    if len(pair) > 1:
        circuit.metadata["corrupted"] = pair[1].text
    return circuit.merged(lambda node: _as_asked(node, nodes)) if set(nodes) != set(NODES) else circuit


def _check_nodes(nodes: Sequence[str]) -> None:
    known = [name for names in PLACES for name in names]
    if unknown := [name for name in nodes if name not in known]:
        raise DePassError(f"there are no nodes {unknown[0]!r}; choose among {', '.join(known)}")
    for names in PLACES:
        if sum(name in nodes for name in names) != 1:
            raise DePassError(
                f"nodes needs one of {', '.join(names)}: everything that writes to the residual stream must "
                "be a node, so that edges sum to the scores"
            )


def _corrupted(
    decoder: Decoder,
    tokenizer: PreTrainedTokenizerBase | None,
    corrupted: str | IdsLike,
    prompt: Prompt,
    whole: Prompt,
) -> Prompt:
    """Return the corrupted prompt, with the same answer where one is explained."""
    text, ids = (corrupted, None) if isinstance(corrupted, str) else (None, corrupted)
    (other,) = prompts_of(decoder, tokenizer, text, ids, None)
    if len(other.ids) != len(prompt.ids):
        raise DePassError(
            f"the corrupted prompt has {len(other.ids)} tokens and the prompt {len(prompt.ids)}; give one of "
            "the same length, with tokens replaced one by one"
        )
    answer = whole.ids[len(prompt.ids) :]
    return continued(other, answer, tokenizer) if answer else other


def _layout(
    decoder: Decoder, question: Question, settings: Settings, runs: int, by_position: bool
) -> FlowLayout:
    """Number the nodes, and check that all edges fit in memory."""
    heads = tuple(block.attention.heads for block in decoder.blocks[: question.layer])
    assert isinstance(settings.rule, LinearPaths)
    paths = len(PATHS) if not settings.rule.forward else 1
    layout = FlowLayout(question.position + 1, heads, by_position, paths)
    size = runs * paths * (layout.target + 1) ** 2 * decoder.dtype.itemsize
    if size > settings.budget.components:
        raise DePassError(
            f"the edges of {layout.target + 1} nodes take {size / 2**30:.1f} GiB, more than the memory for "
            "components; pass by_position=False, or a shorter prompt"
        )
    return layout


def _described(
    decoder: Decoder,
    question: Question,
    readout: Readout,
    layout: FlowLayout,
    result: Flow,
    settings: Settings,
) -> Circuit:
    """Return a flow with its nodes named; with two runs, also their difference."""
    answer, prompt = readout.answers[0][0], question.prompt
    circuit = Circuit(
        nodes=_nodes(layout, prompt, answer.name),
        edges=result.edges[0],
        scores=result.scores[0],
        value=answer.value,
        target=answer.name,
        text=prompt.text,
        tokens=prompt.tokens,
        token_ids=prompt.ids,
        rule=settings.rule_name,
        position=question.position,
        paths=list(PATHS[: layout.paths]),
        metadata={
            "model": decoder.name,
            "prediction": answer.prediction,
            "probability": answer.probability,
            "target_ids": answer.ids,
        },
    )
    if len(result.scores) > 1:
        edges, scores = (part[0] - part[1] for part in (result.edges, result.scores))
        circuit.difference = replace(circuit, edges=edges, scores=scores, value=float(scores[-1]))
    return circuit


def _nodes(layout: FlowLayout, prompt: Prompt, target: str) -> list[Component]:
    tokens = [Component("token", token, span=(i, i + 1)) for i, token in enumerate(prompt.tokens)]
    nodes = [*tokens[: layout.positions], Component("bias", "bias")]
    for layer, count in enumerate(layout.heads):
        block = [Component("head", f"layer {layer} head {head}", layer, head) for head in range(count)]
        for node in (*block, Component("mlp", f"layer {layer} mlp", layer)):
            if layout.by_position:
                nodes += [
                    replace(node, label=f"{node.label} at {i}", span=(i, i + 1))
                    for i in range(layout.positions)
                ]
            else:
                nodes.append(node)
    return [*nodes, Component("target", target)]


def _as_asked(node: Component, nodes: Sequence[str]) -> Component:
    """Return the coarser node that a token or a head is part of, if it was requested."""
    if node.kind == "token" and "embedding" in nodes:
        return Component("embedding", "embedding")
    if node.kind == "head" and "attentions" in nodes:
        place = "" if node.span is None else f" at {node.span[0]}"
        return Component("attention", f"layer {node.layer} attention{place}", node.layer, span=node.span)
    return node
