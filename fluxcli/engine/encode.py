"""The first phase: prompts become embeddings, by CLIP and T5, unless they are known already.

Where a picture is to look like others, tokens of these stand behind its prompt's (see `redux`).

The encoders take one after the other, each for all prompts of the group, so that a device that has
room for one of them needs no more.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from fluxcli.engine import redux
from fluxcli.engine.components import Components
from fluxcli.engine.picture import Picture
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.engine.text import TokenIds
from fluxcli.events import Event, Notice, Phase
from fluxcli.pictures.inputs import InputPicture


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that is not denoised its `embeddings`; a prompt is encoded once for all."""
    waiting = [
        picture for picture in pictures if not picture.denoised and picture.embeddings is None
    ]
    looks = yield from _look(components, waiting)
    yield from _encode(components, [each for each in waiting if each.request.prompt])
    for picture in waiting:
        if picture.inputs.redux:
            _add_looks(components, picture, looks)
    for picture in pictures:
        if picture.request.true_scale > 1 and not picture.denoised:
            yield from _encode_negative(components, picture)


def _look(
    components: Components, pictures: Sequence[Picture]
) -> Generator[Event, None, dict[str, Tensor]]:
    """What the inputs of these pictures look like, (1, L, C) each, by its file's digest."""
    looks = components.looks
    found: dict[str, Tensor] = {}
    unknown: dict[str, InputPicture] = {}
    for given in dict.fromkeys(each for picture in pictures for each in picture.inputs.redux):
        known = looks.find(looks.key_of(given))
        if known is None:
            unknown[given.sha256] = given
        else:
            found[given.sha256] = known
    states = yield from _run_image_encoder(components, unknown)
    found |= yield from _run_image_embedder(components, unknown, states=states)
    return found


def _run_image_encoder(
    components: Components, unknown: Mapping[str, InputPicture]
) -> Generator[Event, None, dict[str, Tensor]]:
    """SigLIP's last hidden state (1, L, D) of each picture, by its file's digest."""
    states = {}
    for digest, given in unknown.items():
        siglip = yield from components.load("image_encoder")
        yield Phase("encode")
        values = redux.make_values(given.read_pixels(), components.looks.side_px)
        values = values.to(siglip.device, siglip.dtype)
        states[digest] = siglip(values).last_hidden_state.cpu()
    return states


def _run_image_embedder(
    components: Components, unknown: Mapping[str, InputPicture], *, states: Mapping[str, Tensor]
) -> Generator[Event, None, dict[str, Tensor]]:
    """The look (1, L, C) of each picture, by its file's digest."""
    found = {}
    for digest, given in unknown.items():
        embedder = yield from components.load("image_embedder")
        yield Phase("encode")
        look = embedder(states[digest].to(embedder.device, embedder.dtype)).image_embeds.cpu()
        components.looks.keep(components.looks.key_of(given), look)
        found[digest] = look
    return found


def _add_looks(components: Components, picture: Picture, looks: Mapping[str, Tensor]) -> None:
    """Put what a picture is to look like behind its prompt's embeddings, or behind zeros."""
    prompt = picture.embeddings
    if prompt is None:
        prompt = redux.make_empty_prompt(picture.request, components.checkpoint)
    picture.embeddings = redux.combine(
        prompt,
        [looks[given.sha256] for given in picture.inputs.redux],
        [each.strength for each in picture.request.redux],
    )


def _encode_negative(components: Components, picture: Picture) -> Iterator[Event]:
    """Give a picture the embeddings of its negative prompt, as if that were one of its own."""
    if picture.negative_embeddings is not None:
        return
    negative = replace(
        picture.request, prompt=picture.request.negative_prompt or "", negative_prompt=None
    )
    stand_in = Picture(negative, picture.adapters)
    yield from _encode(components, [stand_in])
    picture.negative_embeddings = stand_in.embeddings


def _encode(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture its `embeddings`, of its prompt alone."""
    prompts = components.prompts
    waiting = [
        picture for picture in pictures if not picture.denoised and picture.embeddings is None
    ]
    by_key: dict[str, list[Picture]] = {}
    for picture in waiting:
        key = prompts.key_of(picture.request, picture.adapters)
        by_key.setdefault(key, []).append(picture)

    found: dict[str, Embeddings] = {}
    unknown: dict[str, Picture] = {}  # one picture of each prompt
    for key, same in by_key.items():
        embeddings = prompts.find(key)
        if embeddings is None:
            unknown[key] = same[0]
        else:
            found[key] = embeddings

    token_ids = yield from _tokenize(components, unknown)
    pooled = yield from _run_clip(components, unknown, token_ids=token_ids)
    found |= yield from _run_t5(components, unknown, token_ids=token_ids, pooled=pooled)

    for key, same in by_key.items():
        for picture in same:
            picture.embeddings = found[key]
        if lost := found[key].lost:
            limit = same[0].request.text_tokens
            yield Notice(f"the prompt is longer than {limit} T5 tokens; lost: {lost!r}")
        unread = found[key].unknown
        if unread and not prompts.is_bundled:  # whose words are known, see `list_remarks`
            yield Notice(f"T5 has no tokens for these, and reads <unk> in their place: {unread}")
    for remark in prompts.list_remarks([same[0].request for same in by_key.values()]):
        yield Notice(remark)


def _tokenize(
    components: Components, unknown: Mapping[str, Picture]
) -> Generator[Event, None, dict[str, TokenIds]]:
    """The token ids of each prompt, by its key."""
    token_ids = {}
    for key, picture in unknown.items():
        if not components.prompts.has_tokenizers:
            yield Phase("load", "tokenizers")
        token_ids[key] = components.prompts.tokenize(picture.request)
    return token_ids


# One function for each encoder: the first one's module must be gone while the second is loaded.


def _run_clip(
    components: Components, unknown: Mapping[str, Picture], *, token_ids: Mapping[str, TokenIds]
) -> Generator[Event, None, dict[str, Tensor]]:
    """The pooled embeddings (1, P) of each prompt, by its key."""
    pooled = {}
    for key, picture in unknown.items():
        clip = yield from components.load("text_encoder", picture.adapters)
        yield Phase("encode")
        pooled[key] = clip(token_ids[key].clip.to(clip.device)).pooler_output.cpu()
    return pooled


def _run_t5(
    components: Components,
    unknown: Mapping[str, Picture],
    *,
    token_ids: Mapping[str, TokenIds],
    pooled: Mapping[str, Tensor],
) -> Generator[Event, None, dict[str, Embeddings]]:
    """The embeddings of each prompt, by its key; kept one by one, in case that memory runs out."""
    found = {}
    for key, picture in unknown.items():
        t5 = yield from components.load("text_encoder_2", picture.adapters)
        yield Phase("encode")
        sequence = t5(token_ids[key].t5.to(t5.device))[0].cpu()  # (1, T, C)
        found[key] = Embeddings(pooled[key], sequence, token_ids[key].lost, token_ids[key].unknown)
        components.prompts.keep(key, found[key])
    return found
