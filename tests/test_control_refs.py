"""--control as text: which part is the kind, which the picture's name, which are numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fluxcli.errors import UsageError
from fluxcli.request.inputs import ControlRef

TEXTS = {
    "canny:photo.jpg": ("canny", "photo.jpg"),
    "canny:photo.jpg:0.7": ("canny", "photo.jpg", 0.7),
    "canny:photo.jpg:0-0.8": ("canny", "photo.jpg", None, 0.0, 0.8),
    "canny:photo.jpg:.7:0.1-.8": ("canny", "photo.jpg", 0.7, 0.1, 0.8),
    "pose:/a/b.png:1": ("pose", "/a/b.png", 1.0),
    # Windows
    r"canny:C:\pictures\x.png": ("canny", r"C:\pictures\x.png"),
    r"canny:C:\pictures\x.png:0.5:0-1": ("canny", r"C:\pictures\x.png", 0.5, 0.0, 1.0),
    "canny:C:/x.png:0.5": ("canny", "C:/x.png", 0.5),
    r"C:\net.safetensors:D:\x.png:0.5": (r"C:\net.safetensors", r"D:\x.png", 0.5),
    r"\\server\share\net:x.png": (r"\\server\share\net", "x.png"),
    # names with colons, and with what looks like a number
    "tile:12:30:00.png": ("tile", "12:30:00.png"),
    "tile:a:b:c.png:0.3": ("tile", "a:b:c.png", 0.3),
    "canny:0.7": ("canny", "0.7"),
    "canny:1-2.png": ("canny", "1-2.png"),
    # the hub
    "ORG/NAME:x.png:0.7": ("ORG/NAME", "x.png", 0.7),
    "ORG/NAME@v1:x.png": ("ORG/NAME@v1", "x.png"),
    "ORG/NAME:net.safetensors:x.png:0.7": ("ORG/NAME:net.safetensors", "x.png", 0.7),
    "ORG/NAME:a/net.safetensors:C:/x.png": ("ORG/NAME:a/net.safetensors", "C:/x.png"),
    "hf:ORG/NAME:x.png": ("hf:ORG/NAME", "x.png"),
    "https://huggingface.co/ORG/NAME:x.png:1:0-.5": (
        "https://huggingface.co/ORG/NAME",
        "x.png",
        1.0,
        0.0,
        0.5,
    ),
    "nets/pose.safetensors:x.png": ("nets/pose.safetensors", "x.png"),
    # pairs
    "kind=canny,image=x.png": ("canny", "x.png"),
    "image=a, b:c.png,kind=canny,scale=0.7": ("canny", "a, b:c.png", 0.7),
    "kind=union-pro,image=x.png,mode=tile,end=0.6": (
        "union-pro",
        "x.png",
        None,
        None,
        0.6,
        "tile",
    ),
    "mode=3,kind=n.safetensors,image=12:30": ("n.safetensors", "12:30", None, None, None, "3"),
}


@pytest.mark.parametrize("text", TEXTS)
def test_a_control_is_parsed_and_read_back(text):
    ref = ControlRef.parse(text)
    assert ref == ControlRef(*TEXTS[text])
    assert ControlRef.parse(str(ref)) == ref


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("photo.jpg", "names no picture"),
        (r"C:\photo.jpg", "names no picture"),
        ("ORG/NAME", "names no picture"),
        ("", "names no picture"),
        ("canny:", "a kind and a picture"),
        (":x.png", "a kind and a picture"),
        ("kind=canny", "a kind and a picture"),
        ("canny:x\0.png", "a kind and a picture"),
        ("canny:x.png:11", "scale 11 is not in 0 to 10"),
        ("canny:x.png:0.8-0.2", "0.8-0.2 are no shares"),
        ("canny:x.png:0-1.5", "0-1.5 are no shares"),
        ("kind=canny,image=x.png,scale=much", "not a number"),
        ("kind=canny,image=x.png,scale=nan", "not a number"),
        ("kind=canny,image=x.png,image=y.png", "twice"),
        ("kind=canny,image=x.png,mode=a b", "no name or number"),
    ],
)
def test_what_is_no_control_says_why(text, words):
    with pytest.raises(UsageError, match=words) as caught:
        ControlRef.parse(text, where="row 3")
    assert caught.value.which == "row 3" and "--control" in caught.value.hint


NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1)


@given(
    kind=NAMES,
    image=NAMES,
    scale=st.none() | st.floats(0, 10),
    end=st.none() | st.floats(0.01, 1),
    mode=st.none() | st.sampled_from(["tile", "3", "low-quality"]),
)
def test_whatever_can_be_made_is_read_back(kind, image, scale, end, mode):
    try:
        ref = ControlRef.make(kind, image, scale=scale, span=(None, end), mode=mode)
    except UsageError:
        return
    assert ControlRef.parse(str(ref)) == ref


@given(st.text())
def test_any_text_is_a_control_or_a_usage_error(text):
    try:
        ref = ControlRef.parse(text)
    except UsageError:
        return
    assert ref.kind and ref.image
