"""How the page of `gallery` looks, and its only program: the search."""

STYLE = """
:root { color-scheme: light dark; --page: #fafafa; --ink: #1b1b1f; --soft: #5c5c66;
  --card: #ffffff; --line: #dcdce3; --link: #1d4ed8; }
@media (prefers-color-scheme: dark) {
  :root { --page: #131316; --ink: #e8e8ec; --soft: #a3a3ad; --card: #1d1d22; --line: #33333b;
    --link: #93b4ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 96rem; background: var(--page);
  color: var(--ink); font: 1rem/1.45 system-ui, sans-serif; }
header { display: flex; flex-wrap: wrap; align-items: baseline; gap: .25rem 1rem;
  margin-bottom: 1rem; }
h1 { font-size: 1.4rem; margin: 0; overflow-wrap: anywhere; }
header p { margin: 0; color: var(--soft); }
header label { display: flex; align-items: center; gap: .5rem; margin-left: auto;
  color: var(--soft); }
input { font: inherit; color: inherit; background: var(--card); border: 1px solid var(--line);
  border-radius: .4rem; padding: .35rem .6rem; flex: 1; min-width: 0; width: 18rem; }
section { border-top: 1px solid var(--line); padding: 1rem 0; }
h2 { font-size: 1.05rem; font-weight: 600; margin: 0 0 .3rem; overflow-wrap: anywhere;
  white-space: pre-wrap; max-height: 9em; overflow-y: auto; unicode-bidi: isolate; }
ul { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem .9rem; margin: 0 0 .7rem;
  padding: 0; color: var(--soft); font-size: .875rem; }
li { overflow-wrap: anywhere; min-width: 0; }
.pictures { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 10.5rem), 1fr)); }
figure { margin: 0; min-width: 0; background: var(--card); border: 1px solid var(--line);
  border-radius: .5rem; overflow: hidden; }
figure a { display: block; }
figure a:focus-visible { outline: 3px solid var(--link); outline-offset: -3px; }
img { display: block; width: 100%; height: auto; }
figcaption { padding: .4rem .6rem .5rem; font-size: .875rem; }
figcaption b { font-weight: 600; }
figcaption span { display: block; color: var(--soft); overflow-wrap: anywhere;
  unicode-bidi: isolate; }
summary { cursor: pointer; color: var(--link); padding: .2rem 0; }
pre { margin: .3rem 0 0; padding: .5rem; background: var(--page); border-radius: .3rem;
  white-space: pre-wrap; overflow-wrap: anywhere; user-select: all; font-size: .8rem;
  max-height: 14em; overflow-y: auto; }
[hidden] { display: none !important; }
@media (max-width: 30rem) {
  header label { width: 100%; }
  .pictures { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .5rem; } }
"""

# Every word must stand somewhere in a section, or in a figure of it: then the others are hidden.
SCRIPT = """
const label = document.getElementById("search");
const count = document.getElementById("count");
label.hidden = false;
const sections = [...document.querySelectorAll("section")].map((section) => ({
  section,
  head: (section.querySelector("h2").textContent + " "
    + section.querySelector("ul").textContent).toLowerCase(),
  figures: [...section.querySelectorAll("figure")].map((figure) => ({
    figure, text: figure.querySelector("figcaption").textContent.toLowerCase() })),
}));
label.querySelector("input").addEventListener("input", (event) => {
  const words = event.target.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const { section, head, figures } of sections) {
    const missing = words.filter((word) => !head.includes(word));
    let here = 0;
    for (const { figure, text } of figures) {
      figure.hidden = !missing.every((word) => text.includes(word));
      here += !figure.hidden;
    }
    section.hidden = here === 0;
    shown += here;
  }
  count.textContent = words.length ? shown + " found" : count.dataset.all;
});
"""
