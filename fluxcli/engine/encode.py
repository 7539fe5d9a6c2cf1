"""The first phase: prompts become embeddings, by CLIP and T5, unless they are known already.

Where a picture is to look like others, tokens of these stand behind its prompt's (see `redux`).

The encoders take one after the other, each for all prompts of the group, so that a device that has
room for one of them needs no more.
"""

from collections.abc import Generator, Iterator, Mapping, Sequence

from torch import Tensor

from fluxcli.engine import redux
from fluxcli.engine.components import Components
from fluxcli.engine.picture import Picture
from fluxcli.engine.prompt_cache import Embeddings
from fluxcli.engine.text import Text, TokenIds
from fluxcli.events import Event, Notice, Phase
from fluxcli.pictures.inputs import InputPicture


def run(components: Components, pictures: Sequence[Picture]) -> Iterator[Event]:
    """Give each picture that is not denoised its `embeddings`, and those of its negative prompt.

    A text is encoded once for all.
    """
    waiting = [picture for picture in pictures if not picture.denoised]
    lacking = [picture for picture in waiting if picture.embeddings is None]
    prompts = {
        picture: _make_text(picture, picture.request.prompt)
        for picture in lacking
        if picture.request.prompt
    }
    negatives = {
        picture: _make_text(picture, picture.request.negative_prompt or "")
        for picture in waiting
        if picture.request.true_scale > 1 and picture.negative_embeddings is None
    }
    looks = yield from _look(components, lacking)
    found = yield from _encode(components, [*prompts.values(), *negatives.values()])
    for picture in lacking:
        prompt = found[prompts[picture]] if picture in prompts else None
        if picture.inputs.redux:
            prompt = _add_looks(components, picture, prompt=prompt, looks=looks)
        picture.embeddings = prompt
    for picture, text in negatives.items():
        picture.negative_embeddings = found[text]
    one_of_each = {text: picture.request for picture, text in prompts.items()}
    for remark in components.prompts.list_remarks(list(one_of_each.values())):
        yield Notice(remark)


def _make_text(picture: Picture, prompt: str) -> Text:
    return Text(prompt, picture.request.text_tokens, picture.adapters)


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


def _add_looks(
    components: Components,
    picture: Picture,
    *,
    prompt: Embeddings | None,
    looks: Mapping[str, Tensor],
) -> Embeddings:
    """The prompt's embeddings, or zeros, with what a picture is to look like behind them."""
    if prompt is None:
        prompt = redux.make_empty_prompt(picture.request, components.checkpoint)
    return redux.combine(
        prompt,
        [looks[given.sha256] for given in picture.inputs.redux],
        [each.strength for each in picture.request.redux],
    )


def _encode(
    components: Components, texts: Sequence[Text]
) -> Generator[Event, None, dict[Text, Embeddings]]:
    """The embeddings of each text; says what they lack."""
    prompts = components.prompts
    keys = {text: prompts.key_of(text) for text in texts}
    known: dict[str, Embeddings] = {}
    unknown: dict[str, Text] = {}  # one text of each key
    for text, key in keys.items():
        embeddings = prompts.find(key)
        if embeddings is None:
            unknown[key] = text
        else:
            known[key] = embeddings
    token_ids = yield from _tokenize(components, unknown)
    pooled = yield from _run_clip(components, unknown, token_ids=token_ids)
    known |= yield from _run_t5(components, unknown, token_ids=token_ids, pooled=pooled)
    for key, text in {key: text for text, key in keys.items()}.items():
        if lost := known[key].lost:
            limit = text.text_tokens
            yield Notice(f"the prompt is longer than {limit} T5 tokens; lost: {lost!r}")
        unread = known[key].unknown
        if unread and not prompts.is_bundled:  # whose words are known, see `list_remarks`
            yield Notice(f"T5 has no tokens for these, and reads <unk> in their place: {unread}")
    return {text: known[key] for text, key in keys.items()}


def _tokenize(
    components: Components, unknown: Mapping[str, Text]
) -> Generator[Event, None, dict[str, TokenIds]]:
    """The token ids of each text, by its key."""
    token_ids = {}
    for key, text in unknown.items():
        if not components.prompts.has_tokenizers:
            yield Phase("load", "tokenizers")
        token_ids[key] = components.prompts.tokenize(text)
    return token_ids


# One function for each encoder: the first one's module must be gone while the second is loaded.


def _run_clip(
    components: Components, unknown: Mapping[str, Text], *, token_ids: Mapping[str, TokenIds]
) -> Generator[Event, None, dict[str, Tensor]]:
    """The pooled embeddings (1, P) of each text, by its key."""
    pooled = {}
    for key, text in unknown.items():
        clip = yield from components.load("text_encoder", text.adapters)
        yield Phase("encode")
        pooled[key] = clip(token_ids[key].clip.to(clip.device)).pooler_output.cpu()
    return pooled


def _run_t5(
    components: Components,
    unknown: Mapping[str, Text],
    *,
    token_ids: Mapping[str, TokenIds],
    pooled: Mapping[str, Tensor],
) -> Generator[Event, None, dict[str, Embeddings]]:
    """The embeddings of each text, by its key; kept one by one, in case that memory runs out."""
    found = {}
    for key, text in unknown.items():
        t5 = yield from components.load("text_encoder_2", text.adapters)
        yield Phase("encode")
        sequence = t5(token_ids[key].t5.to(t5.device))[0].cpu()  # (1, T, C)
        found[key] = Embeddings(pooled[key], sequence, token_ids[key].lost, token_ids[key].unknown)
        components.prompts.keep(key, found[key])
    return found
