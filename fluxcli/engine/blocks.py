"""The transformer's forward: diffusers' arithmetic, with fewer launches and passes over memory.

Every number comes of the same operations in the same order as in diffusers'
`transformer_flux.py`: on the CPU the bits are the same. What is left out moves numbers or makes
them again. Text and picture lie in one tensor (B, T + S, D) from the first block to the last, q and
k are rotated as complex numbers by a table that is made once for a size, and what a block made
itself is changed in place. On CUDA a compiler may join the products and sums of the rotation, which
changes the last bit of a float32 that is rounded to 16 bit right after.

Where `kernels` names a back end of comfy-kitchen (see `quant.kernels`), norm and rotation of q and
k are one launch, as are norm and modulation: they round once where diffusers rounds several times.

The classes take the place of diffusers' own on loaded modules; their layers, hooks and weights stay
what they are. B is the batch, T and S the tokens of text and picture, D the width, H heads of d
channels, M the width of a single block's MLP.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fluxcli.engine import classes
from quant import kernels
from quant.linear import explain_failed_probe

HALF_MAX = 65504  # the largest float16
# Of comfy-kitchen; see `choose_backend`.
FUNCTIONS = ("rms_rope", "adaln")
KERNEL_DTYPES = (torch.bfloat16, torch.float16)
# What was chosen, by device and dtype.
CHOSEN: dict[tuple[str, torch.dtype], kernels.Choice] = {}


def install(model: Any, *, backend: str = "") -> None:
    """Make a transformer of diffusers', and its blocks, compute as here.

    `backend` is comfy-kitchen's, for what its kernels compute beside products; "" for plain torch.
    """
    model.__class__ = transformer()
    install_blocks(model, backend=backend)
    _prepare_norms(model.norm_out)


def install_blocks(model: Any, *, backend: str) -> None:
    """As `install`, of a model whose own forward stays as it is."""
    model.kernels = backend
    for block in model.transformer_blocks:
        block.__class__ = double_block()
        block.kernels = backend
        _prepare_norms(block.norm1, block.norm1_context)
    for block in model.single_transformer_blocks:
        block.__class__ = single_block()
        block.kernels = backend
        _prepare_norms(block.norm)


def choose_backend(multiply: str, device: str, *, dtype: torch.dtype) -> kernels.Choice:
    """Which back end of comfy-kitchen computes what is between products in `dtype`, and why so.

    None where `multiply` is not by one, so that a picture in 16 bit has the same pixels whether the
    library is there or not. A device is asked once.
    """
    if not kernels.find_backend(multiply) or dtype not in KERNEL_DTYPES:
        return kernels.Choice("")
    if (device, dtype) not in CHOSEN:
        check = functools.partial(_check_backend, device, dtype)
        CHOSEN[device, dtype] = kernels.choose(FUNCTIONS, device, check=check)
    return CHOSEN[device, dtype]


def _check_backend(device: str, dtype: torch.dtype, backend: str) -> str:
    """Norm, turn and modulate small tensors; returns "", or what is wrong with the result."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype).float()

    x, shift, scale = draw(1, 40, 256), draw(1, 1, 256), draw(1, 1, 256)
    query, key, weight = draw(1, 40, 3, 64), draw(1, 40, 3, 64), draw(64)
    angles = draw(40, 32)
    rotation = torch.polar(torch.ones_like(angles), angles)[:, None]
    expected = [
        functional.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift,
        *(
            rotate(functional.rms_norm(each, (64,), weight, 1e-6), rotation)
            for each in (query, key)
        ),
    ]
    there = [each.to(device, dtype) for each in (x, shift, scale, query, key, weight)]
    x, shift, scale, query, key, weight = there
    try:
        modulated = kernels.norm_and_modulate(x, scale, shift, epsilon=1e-6, backend=backend)
        turned = kernels.norm_and_turn(
            query,
            key,
            _make_turns(angles.cos(), angles.sin()).to(device),
            query_weight=weight,
            key_weight=weight,
            epsilon=1e-6,
            backend=backend,
        )
        found = [each.float().cpu() for each in (modulated, *turned)]
    except Exception as error:  # noqa: BLE001 - kernels raise anything
        return explain_failed_probe(error, device)
    for made, exact in zip(found, expected, strict=True):
        # Each value is rounded to 16 bit, some of them before they are turned, too.
        if not (made - exact).norm() <= 2 * torch.finfo(dtype).eps * exact.norm():
            return "it norms otherwise than torch"
    return ""


def _prepare_norms(*norms: Any) -> None:
    for norm in norms:
        norm.add_one = AddOne()


class AddOne(nn.Module):
    """1 + scale; with modulation tables a constant takes its place."""

    def forward(self, values: Tensor) -> Tensor:
        return 1 + values


@dataclass(frozen=True)
class Residuals:
    """What one ControlNet adds to a picture's tokens after the transformer's blocks.

    Tensors (B, S, D), of which each serves as many blocks in a row as there are more blocks than
    tensors; with `repeats` they take turns instead, as XLabs' do.
    """

    double: Sequence[Tensor] = ()
    single: Sequence[Tensor] = ()
    repeats: bool = False

    def add_double(self, image: Tensor, index: int, count: int) -> None:
        """Add to the picture's tokens (B, S, D) what is for double block `index` of `count`."""
        if self.double and self.repeats:
            image.add_(self.double[index % len(self.double)])
        elif self.double:
            image.add_(self.double[index // -(-count // len(self.double))])

    def add_single(self, image: Tensor, index: int, count: int) -> None:
        """Add to the picture's tokens (B, S, D) what is for single block `index` of `count`."""
        if self.single:
            image.add_(self.single[index // -(-count // len(self.single))])


def make_rotation(model: Any, text_tokens: int, positions: Tensor) -> Tensor:
    """The rotary embedding (T + S, 1, d / 2) complex64 of text and of a picture's tokens.

    `positions` (S, 3) are of the picture's tokens; those of the text are 0. For kernels it is
    float32 (1, T + S, 1, d / 2, 2, 2): the matrix of each pair of channels.
    """
    text_positions = positions.new_zeros(text_tokens, positions.shape[1])
    return _rotation_of(model, torch.cat([text_positions, positions]))


def _rotation_of(model: Any, positions: Tensor) -> Tensor:
    # Each value stands twice, for the two channels of a pair.
    cosines, sines = model.pos_embed(positions)  # (T + S, d) float32 each
    cosines = cosines[:, ::2].contiguous()
    sines = sines[:, ::2].contiguous()
    if model.kernels:
        return _make_turns(cosines, sines)
    return torch.complex(cosines, sines)[:, None]


def _make_turns(cosines: Tensor, sines: Tensor) -> Tensor:
    """The matrices (1, S, 1, d / 2, 2, 2) that turn pairs by angles (S, d / 2)."""
    values = torch.stack([cosines, -sines, sines, cosines], dim=-1)
    return values.unflatten(-1, (2, 2))[None, :, None]


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Turn the pairs of channels of x (..., T + S, H, d), which may be changed in place.

    `rotation` is as of `make_rotation`; in compiled blocks it is a view of that as real numbers.
    """
    if rotation.ndim == 6:
        rotation = rotation[0, ..., 0]  # a matrix' first column: cosine and sine
    if not rotation.is_complex():
        return _rotate_real(x, rotation)
    pairs = x.float().view(torch.complex64)  # (..., T + S, H, d / 2)
    return pairs.mul_(rotation).view(torch.float32).to(x.dtype)


def _rotate_real(x: Tensor, rotation: Tensor) -> Tensor:
    """As `rotate`, by cosines and sines (T + S, 1, d / 2, 2).

    torch's compiler makes no kernels of complex numbers.
    """
    real, imaginary = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = rotation.unbind(-1)
    turned = [real * cosine - imaginary * sine, real * sine + imaginary * cosine]
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def norm_streams(
    norm: Any,
    x: Tensor,
    *,
    sizes: Sequence[int],
    shifts: Sequence[Tensor],
    scales: Sequence[Tensor],
    factors: Sequence[Tensor],
    backend: str,
) -> list[Tensor]:
    """The streams of x (B, T + S, D), of so many tokens as `sizes` says, normed and modulated.

    Each has a shift, a scale and a factor (B, 1, D) of its own; the factor is the scale plus one.
    """
    if backend:
        return [
            kernels.norm_and_modulate(stream, scale, shift, epsilon=norm.eps, backend=backend)
            for stream, scale, shift in zip(x.split(sizes, dim=1), scales, shifts, strict=True)
        ]
    # The norm has no weights, so that one launch norms all streams.
    streams = norm(x).split(sizes, dim=1)
    for stream, factor, shift in zip(streams, factors, shifts, strict=True):
        stream.mul_(factor).add_(shift)
    return list(streams)


def norm_and_rotate(
    query: Tensor, key: Tensor, rotation: Tensor, *, norms: tuple[Any, Any], backend: str
) -> tuple[Tensor, Tensor]:
    """q and k (B, T + S, H, d), normed and turned; they may be changed in place.

    `rotation` is as of `make_rotation`, and `norms` are those of q and of k.
    """
    norm_query, norm_key = norms
    # What an adapter does to a norm is a hook on its module, which kernels know nothing of.
    if not backend or norm_query._forward_hooks or norm_key._forward_hooks:
        query, key = norm_query(query), norm_key(key)
        return rotate(query, rotation), rotate(key, rotation)
    return kernels.norm_and_turn(
        query,
        key,
        rotation,
        query_weight=norm_query.weight,
        key_weight=norm_key.weight,
        epsilon=norm_query.eps,
        backend=backend,
    )


def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The attention (B, T + S, D) of q, k and v (B, T + S, H, d)."""
    attended = functional.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    )
    return attended.transpose(1, 2).flatten(2)


def read_modulation(norm: Any, temb: Tensor, *, count: int) -> tuple[list[Tensor], list[Tensor]]:
    """What a norm's layer makes of `temb` (B, D): tensors (B, 1, D), and the same plus one.

    They are shift, scale and gate in a single block; these for the attention and then those for the
    MLP in a double block; scale and shift in the last norm. Scales are used plus one alone.
    """
    values = norm.linear(norm.silu(temb))  # (B, count x D)
    values, factors = values[:, None], norm.add_one(values)[:, None]
    return list(values.chunk(count, dim=-1)), list(factors.chunk(count, dim=-1))


def split_heads(qkv: Tensor, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v (B, S, H, d) of a fused layer's output (B, S, 3 D).

    CUDA's norm of q and of k would copy each, as their rows are not one behind the other; here one
    copy serves both.
    """
    heads = qkv.unflatten(-1, (3, -1, channels))
    query, key = heads[:, :, :2].movedim(2, 0).contiguous()
    return query, key, heads[:, :, 2]


@functools.cache
def double_block() -> type[nn.Module]:
    """diffusers' block for two streams, text and picture."""

    class DoubleBlock(classes.double_block()):  # type: ignore[misc]  # of a library without types
        def forward(self, x: Tensor, temb: Tensor, rotation: Tensor, text_tokens: int) -> Tensor:
            """The residual stream (B, T + S, D) after this block."""
            sizes = [text_tokens, x.shape[1] - text_tokens]
            text_values, text_factors = read_modulation(self.norm1_context, temb, count=6)
            image_values, image_factors = read_modulation(self.norm1, temb, count=6)

            normed_text, normed_image = norm_streams(
                self.norm1.norm,
                x,
                sizes=sizes,
                shifts=(text_values[0], image_values[0]),
                scales=(text_values[1], image_values[1]),
                factors=(text_factors[1], image_factors[1]),
                backend=self.kernels,
            )
            attended = self._attend(normed_text, normed_image, rotation)
            attended_text, attended_image = attended.split(sizes, dim=1)
            x = _add_gated(
                x,
                self.attn.to_add_out(attended_text).mul_(text_values[2]),
                self.attn.to_out[0](attended_image).mul_(image_values[2]),
            )

            normed_text, normed_image = norm_streams(
                self.norm2,
                x,
                sizes=sizes,
                shifts=(text_values[3], image_values[3]),
                scales=(text_values[4], image_values[4]),
                factors=(text_factors[4], image_factors[4]),
                backend=self.kernels,
            )
            x = _add_gated(
                x,
                self.ff_context(normed_text).mul_(text_values[5]),
                self.ff(normed_image).mul_(image_values[5]),
            )
            if x.dtype == torch.float16:
                x[:, :text_tokens].clamp_(-HALF_MAX, HALF_MAX)
            return x

        def _attend(self, text: Tensor, image: Tensor, rotation: Tensor) -> Tensor:
            """The attention (B, T + S, D) of the two streams' normed tokens."""
            attn = self.attn
            if attn.fused_projections:
                q_text, k_text, v_text = split_heads(attn.to_added_qkv(text), attn.head_dim)
                q_image, k_image, v_image = split_heads(attn.to_qkv(image), attn.head_dim)
            else:
                heads = (-1, attn.head_dim)
                q_text = attn.add_q_proj(text).unflatten(-1, heads)
                k_text = attn.add_k_proj(text).unflatten(-1, heads)
                v_text = attn.add_v_proj(text).unflatten(-1, heads)
                q_image = attn.to_q(image).unflatten(-1, heads)
                k_image = attn.to_k(image).unflatten(-1, heads)
                v_image = attn.to_v(image).unflatten(-1, heads)
            if self.kernels:
                query, key = self._norm_by_kernels(
                    (q_text, q_image), (k_text, k_image), rotation=rotation
                )
                return attend(query, key, torch.cat([v_text, v_image], dim=1))
            normed = [
                attn.norm_added_q(q_text),
                attn.norm_q(q_image),
                attn.norm_added_k(k_text),
                attn.norm_k(k_image),
            ]
            del q_text, q_image, k_text, k_image
            both = torch.cat(normed, dim=1).unflatten(1, (2, -1))  # (B, 2, T + S, H, d)
            del normed
            query, key = rotate(both, rotation).unbind(1)
            del both
            return attend(query, key, torch.cat([v_text, v_image], dim=1))

        def _norm_by_kernels(
            self, queries: tuple[Tensor, Tensor], keys: tuple[Tensor, Tensor], *, rotation: Tensor
        ) -> tuple[Tensor, Tensor]:
            """q and k (B, T + S, H, d) of text and picture, normed and turned."""
            attn = self.attn
            text_tokens = queries[0].shape[1]
            text = norm_and_rotate(
                queries[0],
                keys[0],
                rotation[:, :text_tokens],
                norms=(attn.norm_added_q, attn.norm_added_k),
                backend=self.kernels,
            )
            image = norm_and_rotate(
                queries[1],
                keys[1],
                rotation[:, text_tokens:],
                norms=(attn.norm_q, attn.norm_k),
                backend=self.kernels,
            )
            return torch.cat([text[0], image[0]], dim=1), torch.cat([text[1], image[1]], dim=1)

    return DoubleBlock


def _add_gated(x: Tensor, text: Tensor, image: Tensor) -> Tensor:
    """x (B, T + S, D) plus what the two streams add to it, in a tensor of its own."""
    total = torch.empty_like(x)
    tokens = text.shape[1]
    torch.add(x[:, :tokens], text, out=total[:, :tokens])
    torch.add(x[:, tokens:], image, out=total[:, tokens:])
    return total


@functools.cache
def single_block() -> type[nn.Module]:
    """diffusers' block for the joined stream.

    Where the weights allow it, `proj_in` is one layer for q, k, v and the MLP's input.
    """

    class SingleBlock(classes.single_block()):  # type: ignore[misc]  # of a library without types
        def forward(self, x: Tensor, temb: Tensor, rotation: Tensor) -> Tensor:
            """The residual stream (B, T + S, D) after this block."""
            values, factors = read_modulation(self.norm, temb, count=3)
            [normed] = norm_streams(
                self.norm.norm,
                x,
                sizes=[x.shape[1]],
                shifts=values[:1],
                scales=values[1:2],
                factors=factors[1:2],
                backend=self.kernels,
            )
            if self.attn.fused_projections:
                wide = self._attend_in_place(self.proj_in(normed), rotation)
            else:
                wide = self._attend_apart(normed, rotation)
            del normed
            output = self.proj_out(wide).view(x.shape).mul_(values[2]).add_(x)
            if output.dtype == torch.float16:
                output.clamp_(-HALF_MAX, HALF_MAX)
            return output

        def _attend_in_place(self, projected: Tensor, rotation: Tensor) -> Tensor:
            """The output layer's input (B (T + S), D + M), of q, k, v and the MLP's input.

            `projected` (B, T + S, 3 D + M) is overwritten: the attention takes the place of v,
            which is beside the MLP's, so that nothing is put together afterwards.
            """
            width = (projected.shape[-1] - self.mlp_hidden_dim) // 3
            qkv, mlp = projected.split([3 * width, self.mlp_hidden_dim], dim=-1)
            query, key, value = split_heads(qkv, self.attn.head_dim)
            attended = self._attend(query, key, value, rotation)
            projected[..., 2 * width : 3 * width] = attended
            torch.ops.aten.gelu_(mlp, approximate="tanh")
            # As rows and columns, because torch adds the bias of three dimensions by itself, unless
            # they are contiguous.
            return projected.flatten(0, 1)[:, 2 * width :]

        def _attend_apart(self, normed: Tensor, rotation: Tensor) -> Tensor:
            """The output layer's input, as of `_attend_in_place`, by layers that are not fused.

            `normed` is (B, T + S, D).
            """
            heads = (-1, self.attn.head_dim)
            query = self.attn.to_q(normed).unflatten(-1, heads)
            key = self.attn.to_k(normed).unflatten(-1, heads)
            value = self.attn.to_v(normed).unflatten(-1, heads)
            attended = self._attend(query, key, value, rotation)
            return torch.cat([attended, self.act_mlp(self.proj_mlp(normed))], dim=-1).flatten(0, 1)

        def _attend(self, query: Tensor, key: Tensor, value: Tensor, rotation: Tensor) -> Tensor:
            """The attention (B, T + S, D) of q, k and v (B, T + S, H, d), which are not normed."""
            norms = (self.attn.norm_q, self.attn.norm_k)
            query, key = norm_and_rotate(query, key, rotation, norms=norms, backend=self.kernels)
            return attend(query, key, value)

    return SingleBlock


@functools.cache
def transformer() -> type[nn.Module]:
    """diffusers' transformer over these blocks."""

    class Transformer(classes.transformer()):  # type: ignore[misc]  # of a library without types
        def forward(
            self,
            hidden_states: Tensor,
            encoder_hidden_states: Tensor,
            *,
            pooled_projections: Tensor | None = None,
            timestep: Tensor | None = None,
            guidance: Tensor | None = None,
            img_ids: Tensor | None = None,
            txt_ids: Tensor | None = None,
            rotation: Tensor | None = None,
            residuals: Sequence[Residuals] = (),
            return_dict: bool = False,
        ) -> tuple[Tensor]:
            """The velocity (B, S, 64) of packed latents, for a text's embeddings (B, T, C).

            `rotation` is as of `make_rotation`; without it the ids give one. With modulation tables
            nothing looks at timestep, guidance and pooled embeddings, and they may be missing.
            `residuals` are those of ControlNets.
            """
            image = self.x_embedder(hidden_states)
            text = self.context_embedder(encoder_hidden_states)
            times = [
                time.to(image.dtype) * 1000 for time in (timestep, guidance) if time is not None
            ]
            temb = self.time_text_embed(*times, pooled_projections)
            if rotation is None:
                assert txt_ids is not None and img_ids is not None
                rotation = _rotation_of(self, torch.cat([txt_ids, img_ids]))
            text_tokens = text.shape[1]
            x = torch.cat([text, image], dim=1)
            del text, image
            count = len(self.transformer_blocks)
            for index, block in enumerate(self.transformer_blocks):
                x = block(x, temb, rotation, text_tokens)
                for each in residuals:
                    each.add_double(x[:, text_tokens:], index, count)
            count = len(self.single_transformer_blocks)
            for index, block in enumerate(self.single_transformer_blocks):
                x = block(x, temb, rotation)
                for each in residuals:
                    each.add_single(x[:, text_tokens:], index, count)
            values, factors = read_modulation(self.norm_out, temb, count=2)
            image = x[:, text_tokens:]
            [normed] = norm_streams(
                self.norm_out.norm,
                image,
                sizes=[image.shape[1]],
                shifts=values[1:],
                scales=values[:1],
                factors=factors[:1],
                backend=self.kernels,
            )
            return (self.proj_out(normed),)

    return Transformer
