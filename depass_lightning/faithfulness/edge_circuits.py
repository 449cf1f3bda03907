"""Edge-level circuits: how much of a target's value the strongest edges give alone.

The nodes are the token embeddings, every head, every MLP and the target. What a node reads is the residual
stream, the sum of what earlier nodes write. With `o_u` what node u writes in a pass and `s_u` its substitute,
a node whose edges from the nodes U are ablated reads, before its norm,

    residual stream + sum over u in U of (s_u - o_u)

An ablated edge changes nothing else: u writes to all other nodes as before. A head reads the same with its
queries, keys and values. All prompts of a batch run together, and heads of a block whose edges are ablated
from the same nodes share one call of attention: a circuit takes one forward pass.

Source: Mueller et al., "MIB" (ICML 2025, arXiv 2504.13151), whose graphs separate queries, keys and values.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from depass_lightning.engine.flow import FlowLayout
from depass_lightning.engine.norms import FrozenNorm, NormParameters
from depass_lightning.errors import DePassError
from depass_lightning.faithfulness.true_ablation import contrast
from depass_lightning.methods.model_runs import embeddings_replaced, run
from depass_lightning.methods.places import place_of, separate_mlp
from depass_lightning.models.block import Block
from depass_lightning.models.decoder import Decoder
from depass_lightning.prompts import pad
from depass_lightning.results.attribution import Attribution

Group = tuple[list[int], Tensor | None]  # readers, numbered from the first, and what is added to their input
Inputs = Callable[[range, Float[Tensor, "node row position hidden"]], list[Group]]


def edge_layout(decoder: Decoder) -> FlowLayout:
    """Return the numbers of a model's nodes: the embedding is 0, and the target is the last.

    Raises:
        DePassError: the residual stream is not the sum of what nodes write.
    """
    reason = _obstacle(decoder)
    if reason is not None:
        raise DePassError(f"edges cannot be ablated in {type(decoder.model).__name__}: {reason}")
    return FlowLayout(0, tuple(block.attention.heads for block in decoder.blocks), by_position=False, paths=1)


def _obstacle(decoder: Decoder) -> str | None:
    """Return why the residual stream is not the sum of what modules write, if it is not."""
    blocks = decoder.blocks
    sublayers = [part for block in blocks for part in (block.attention, block.mlp)]
    if not decoder.causal:
        return "it is an encoder"
    if any(part.residual != "none" or part.residual_weight is not None for part in sublayers):
        return "it rescales its residual stream between blocks; take circuits=[nodes]"
    if decoder.final_norm is None:
        return "it has no norm before its output; take circuits=[nodes]"
    if any(block.attention.norm in [*block.attention.module.modules()][1:] for block in blocks):
        return "its attention contains the norm before it; take circuits=[nodes]"
    if any(block.attention.module is block.module or not separate_mlp(block) for block in blocks):
        return "some blocks have no attention, or run their experts without a module of their own"
    return None


def possible_edges(decoder: Decoder) -> Bool[Tensor, "from to"]:
    """Return which pairs of a model's nodes have an edge."""
    layout = edge_layout(decoder)
    edges = torch.ones(layout.target + 1, layout.target + 1, dtype=torch.bool).triu(1)
    for block in decoder.blocks:
        first, mlp = layout.heads_of(block.index), layout.mlp_of(block.index)
        edges[first:mlp, first : mlp + block.parallel] = False  # heads of a block do not read each other
        if block.mlp.absent:
            edges[mlp] = edges[:, mlp] = False
    return edges


@dataclass(frozen=True)
class PairBatch:
    """Right-padded prompts, each with a corrupted one of the same length.

    Args:
        ids: the prompts' token ids.
        corrupted: those of the corrupted prompts.
        ends: the position that each target is read at.
        targets: the ids of each target's tokens; its value is the first's logit less the others'.
    """

    ids: Int[Tensor, "row position"]
    corrupted: Int[Tensor, "row position"]
    ends: Int[Tensor, "row"]
    targets: Int[Tensor, "row token"]

    @classmethod
    def of(
        cls, decoder: Decoder, attributions: Sequence[Attribution], corrupted: Sequence[Sequence[int]]
    ) -> "PairBatch":
        """Join the prompts and targets of attributions, whose scores are not used."""
        ids = [attribution.token_ids[: attribution.position + 1] for attribution in attributions]
        ends = torch.tensor([attribution.position for attribution in attributions])
        targets = torch.tensor([attribution.target_ids for attribution in attributions])
        tables = pad(ids), pad([list(other) for other in corrupted]), ends, targets
        return cls(*(table.to(decoder.device) for table in tables))

    def values(self, decoder: Decoder, ids: Tensor) -> Float[Tensor, "row"]:
        """Run the model on one of the two sets of prompts, and return the targets' values."""
        _, uncapped = run(decoder, ids, self.ends)
        return contrast(uncapped.gather(1, self.targets.to(uncapped.device)).to(decoder.dtype))


class _Hooks:
    """Hooks that keep what nodes write in a pass, and change what they read.

    Args:
        decoder: the model.
        shape: the numbers of rows and positions.
        base: what is subtracted from what nodes write, such as their substitutes.
        inputs: returns, for nodes of one sublayer and what earlier nodes wrote, what is added to their input.
    """

    def __init__(
        self,
        decoder: Decoder,
        shape: tuple[int, int],
        base: Float[Tensor, "node row position hidden"] | None,
        inputs: Inputs,
    ) -> None:
        self.decoder, self.layout, self.base, self.inputs = decoder, edge_layout(decoder), base, inputs
        self.written = torch.zeros(
            self.layout.target, *shape, decoder.hidden_size, dtype=decoder.dtype, device=decoder.device
        )
        self.rows, self.entered = shape[0], torch.empty(0)
        self.called: list[int] | None = None  # the heads of a further call of attention
        self.norming = False
        self.parts: list[tuple[list[int], Tensor]] = []

    @contextmanager
    def registered(self) -> Iterator[None]:
        """Register the hooks inside the context."""
        with ExitStack() as stack:
            for block in self.decoder.blocks:
                for handle in self._on(block):
                    stack.callback(handle.remove)
            final = self._reading(self.layout.target, self.layout.target)
            assert self.decoder.final_norm is not None
            stack.callback(self.decoder.final_norm.register_forward_pre_hook(final).remove)
            yield

    def _on(self, block: Block) -> Iterator[Any]:
        index, attention, mlp = block.index, block.attention, block.mlp
        first, number = self.layout.heads_of(index), self.layout.mlp_of(index)

        def enter(_module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            self.entered = arguments[0] if arguments else keywords["hidden_states"]
            if index == 0:
                self._write(0, self.entered[None])

        yield block.entry.register_forward_pre_hook(enter, with_kwargs=True)
        yield attention.module.register_forward_pre_hook(self._attending(block), with_kwargs=True)
        yield place_of(self.decoder, index, "head").hooked(self._joining(block), self.rows)
        if attention.post_norm is not None:
            yield attention.post_norm.register_forward_hook(self._rescaling(block, attention.post_norm))
        if not mlp.absent:
            reader = self._reading(number, first if block.parallel else number)
            yield (mlp.norm or mlp.module).register_forward_pre_hook(reader)

            def wrote(outputs: Float[Tensor, "row position 1 hidden"]) -> Tensor:
                self._write(number, block.factor(mlp) * outputs[None, :, :, 0])
                return outputs

            yield place_of(self.decoder, index, "mlp").hooked(wrote, self.rows)

    def _write(self, first: int, outputs: Float[Tensor, "node row position hidden"]) -> None:
        nodes = slice(first, first + len(outputs))
        self.written[nodes] = outputs.detach().to(self.written)
        if self.base is not None:
            self.written[nodes] -= self.base[nodes]

    def _reading(self, node: int, before: int) -> Callable[..., Any]:
        """Change what an MLP or the target reads."""

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...]) -> Any:
            if self.norming:  # for heads, by a norm that they share with the MLP
                return None
            ((_, change),) = self.inputs(range(node, node + 1), self.written[:before])
            if change is None:
                return None
            return (_added(arguments[0], change.view(arguments[0].shape)), *arguments[1:])

        return hook

    def _attending(self, block: Block) -> Callable[..., Any]:
        """Call attention once for each group of heads with the same input."""
        first, norm = self.layout.heads_of(block.index), block.attention.norm

        def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if self.called is not None:
                return None
            nodes = range(first, first + block.attention.heads)
            (_, first_change), *others = self.inputs(nodes, self.written[:first])
            normed = arguments[0] if arguments else keywords["hidden_states"]

            def call(change: Tensor | None) -> tuple[tuple[Any, ...], dict[str, Any]]:
                states = self.entered if change is None else _added(self.entered, change)
                self.norming = True
                states = (states if norm is None else norm(states)).view(normed.shape)
                self.norming = False
                return (  # CTRL's attention is called with the same state for queries, keys and values
                    tuple(states if argument is normed else argument for argument in arguments),
                    {name: states if argument is normed else argument for name, argument in keywords.items()},
                )

            for self.called, change in others:
                positional, named = call(change)
                module(*positional, **named)
            self.called = None
            # A norm that attention shares with the MLP has returned what the MLP reads.
            unchanged = first_change is None and norm is not block.mlp.norm
            return None if unchanged else call(first_change)

        return hook

    def _joining(self, block: Block) -> Callable[[Tensor], Tensor]:
        """Join the heads of several calls of attention, and keep what they write."""
        first, output = self.layout.heads_of(block.index), block.attention.output

        def change(heads: Float[Tensor, "row position head size"]) -> Tensor:
            if self.called is not None:
                self.parts.append((self.called, heads))
                return heads
            for members, part in self.parts:
                places = torch.tensor(members, device=heads.device)
                heads = heads.index_copy(2, places, part.index_select(2, places))
            self.parts = []
            weight = output.linear(self.decoder.dtype).weight.view(-1, *heads.shape[2:])
            outputs = torch.einsum("bnhi,dhi->hbnd", heads.detach().to(weight), weight)
            self._write(first, block.factor(block.attention) * outputs)
            return heads

        return change

    def _rescaling(self, block: Block, norm: nn.Module) -> Callable[..., None]:
        """Apply the scale of the norm after attention to what each head writes."""
        decoder, first = self.decoder, self.layout.heads_of(block.index)
        sizes = decoder.hidden_size, decoder.model_dtype, decoder.dtype
        nodes = slice(first, first + block.attention.heads)
        probe = NormParameters.of(norm, block.attention.module, *sizes)

        def hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            fitted = FrozenNorm.fit(probe, arguments[0].detach(), output.detach(), "a norm after attention")
            outputs = self.written[nodes] + (0 if self.base is None else self.base[nodes])
            self._write(first, probe.direction(outputs) * fitted.scale[..., None])

        return hook


def _added(states: Tensor, change: Tensor) -> Tensor:
    """Add in the precision of components, and return in the model's."""
    return (states.to(change) + change).to(states)


def node_outputs(
    decoder: Decoder, batch: PairBatch, ids: Tensor
) -> tuple[Float[Tensor, "node row position hidden"], Float[Tensor, "row"]]:
    """Run the model on one of the two sets of prompts; return what nodes write, and the targets' values."""
    hooks = _Hooks(decoder, (len(ids), ids.shape[1]), None, lambda nodes, _: [([*range(len(nodes))], None)])
    with hooks.registered():
        values = batch.values(decoder, ids)
    return hooks.written, values


def ablated_values(
    decoder: Decoder,
    batch: PairBatch,
    kept: Bool[Tensor, "from to"],
    substitutes: Float[Tensor, "node row position hidden"],
) -> Float[Tensor, "row"]:
    """Return the targets' values with some edges kept and all others ablated, from one forward pass.

    Args:
        decoder: the model, already set up to be run (`as_depass_runs`), as for the functions around this one.
        batch: the prompts.
        kept: the edges of the circuit.
        substitutes: what replaces each node's output along other edges; rows and positions are broadcast.
    """
    removed = (possible_edges(decoder) & ~kept).to(decoder.device)

    def inputs(nodes: range, written: Tensor) -> list[Group]:
        masks, groups = removed[: len(written), list(nodes)].T.unique(dim=0, return_inverse=True)
        changes = -masks.to(written) @ written.flatten(1)  # [group, row * position * hidden]
        shaped = changes.view(len(masks), *written.shape[1:])
        return [
            ((groups == i).nonzero()[:, 0].tolist(), shaped[i] if bool(mask.any()) else None)
            for i, mask in enumerate(masks)
        ]

    hooks = _Hooks(decoder, (len(batch.ids), batch.ids.shape[1]), substitutes, inputs)
    with hooks.registered():
        return batch.values(decoder, batch.ids)


def input_gradients(
    decoder: Decoder, batch: PairBatch, embeddings: Float[Tensor, "row position hidden"]
) -> Float[Tensor, "node row position hidden"]:
    """Return the targets' gradients by what each node but the embedding reads, at given token embeddings."""
    taps: dict[int, Tensor] = {}

    def inputs(nodes: range, written: Tensor) -> list[Group]:
        for node in nodes:
            taps[node] = torch.zeros_like(written[0], requires_grad=True)
        return [([i], taps[node]) for i, node in enumerate(nodes)]

    hooks = _Hooks(decoder, (len(batch.ids), batch.ids.shape[1]), None, inputs)
    with torch.enable_grad(), embeddings_replaced(decoder, embeddings), hooks.registered():
        total = batch.values(decoder, batch.ids).sum()
    gradients = dict(zip(taps, torch.autograd.grad(total, [*taps.values()]), strict=True))
    nothing = torch.zeros_like(next(iter(taps.values()))).detach()  # what an absent MLP reads
    return torch.stack([gradients.get(node, nothing) for node in range(1, hooks.layout.target + 1)])
