"""The page's frame and style. Nothing is loaded from anywhere: no script, no font, no network."""

from string import Template

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>$title</title>
<style>$style</style>
</head>
<body>
<header>
<h1>$title</h1>
$lead
<nav aria-label="Contents">$contents</nav>
</header>
<main>
$sections
</main>
</body>
</html>
""")

STYLE = """
:root {
  --ground: #ffffff; --ink: #24292f; --faint: #57606b; --grid: #d6dade; --card: #f5f7f9; --link: #0a58a8;
  --warning: #8a5300; --warning-ground: #fff6e5;
  --series-0: #0072b2; --series-1: #d55e00; --series-2: #008a65; --series-3: #b4588d; --series-4: #8f7000;
  --series-5: #2b86b6; --series-6: #6f6f6f;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #14171b; --ink: #e4e7ea; --faint: #a0a9b2; --grid: #353c44; --card: #1d2228; --link: #7cb8f0;
    --warning: #f0c070; --warning-ground: #2d2516;
    --series-0: #4aa8e0; --series-1: #ff8a3d; --series-2: #2fc79a; --series-3: #e29bc4; --series-4: #dcb83c;
    --series-5: #8accf0; --series-6: #a8a8a8;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body { margin: 0 auto; padding: 1.25rem clamp(1rem, 3vw, 2.5rem) 4rem; max-width: 84rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: clamp(1.5rem, 4vw, 2.1rem); line-height: 1.2; margin: .5rem 0 .75rem; text-wrap: balance; }
h2 { font-size: 1.35rem; margin: 3rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--grid); }
p { margin: .6rem 0; max-width: 50rem; overflow-wrap: break-word; }
a { color: var(--link); }
code { font: .88em ui-monospace, "DejaVu Sans Mono", monospace; background: var(--card); padding: .1em .3em;
  border-radius: .25em; overflow-wrap: anywhere; }
.note, figcaption, caption { color: var(--faint); font-size: .88rem; }
.warning, .missing { padding: .5rem .8rem; border-left: .25rem solid var(--grid); background: var(--card);
  font-size: .92rem; }
.warning { border-color: var(--warning); background: var(--warning-ground); }
.summary { font-size: 1.1rem; font-weight: 600; max-width: 58rem; margin: 1.1rem 0 .6rem; }
.verdict { margin: 1rem 0; padding: .9rem 1.1rem .9rem 2rem; background: var(--card); border-radius: .5rem;
  max-width: 58rem; }
.verdict li { margin: .35rem 0; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1.1rem; margin-top: 1.2rem; font-size: .92rem; }
.table { overflow-x: auto; margin: 1rem 0; border: 1px solid var(--grid); border-radius: .5rem;
  max-width: max-content; }
.table:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; padding: .5rem .75rem; }
th, td { padding: .38rem .75rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { font-weight: 600; }
thead th { background: var(--card); vertical-align: bottom; white-space: normal; min-width: 6rem; }
tbody th { font-weight: 500; }
.word { text-align: left; }
.long { white-space: normal; min-width: 18rem; }
td code { background: none; padding: 0; }
.code { white-space: normal; min-width: 11rem; overflow-wrap: anywhere; }
@media (min-width: 40.01rem) { .table th:first-child { position: sticky; left: 0; background: var(--card); } }
@media (max-width: 40rem) {
  .table { border: 0; overflow: visible; max-width: none; }
  table, tbody, caption { display: block; }
  thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(7.5rem, 1fr)); gap: .3rem .9rem;
    padding: .6rem .8rem; margin-bottom: .6rem; border: 1px solid var(--grid); border-radius: .5rem; }
  thead tr { border: 0; }
  th, td { display: block; padding: 0; border: 0; text-align: left; white-space: normal; min-width: 0;
    overflow-wrap: anywhere; }
  tbody th, .long, .code { grid-column: 1 / -1; }
  tbody th { font-weight: 600; font-size: .95rem; }
  tbody th[data-label]::before { content: attr(data-label) " "; }
  td::before { content: attr(data-label); display: block; color: var(--faint); font-size: .78rem; line-height: 1.3; }
  caption { padding: 0 0 .5rem; }
  .panels.small { grid-template-columns: repeat(2, minmax(0, 1fr)); }
}
figure { margin: 1.5rem 0; }
figcaption { margin-top: .5rem; max-width: 50rem; }
.panels { display: grid; gap: 1rem 1.25rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
.panels.two { max-width: 60rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
.panels.single { max-width: 32rem; }
.panels.small { gap: .75rem; grid-template-columns: repeat(auto-fill, minmax(min(45%, 13.5rem), 1fr)); }
.panel { min-width: 0; }
.panel-title { font-size: .88rem; font-weight: 600; margin: 0 0 .15rem; }
.small .panel-title { font-size: .8rem; }
.plot { display: block; width: 100%; height: auto; }
.plot text { font-family: system-ui, "DejaVu Sans", sans-serif !important; }
.legend { display: flex; flex-wrap: wrap; gap: .25rem 1.2rem; list-style: none; margin: 0 0 .6rem; padding: 0;
  font-size: .88rem; }
.legend i { display: inline-block; width: 1.5rem; border-top: .2rem solid; vertical-align: middle;
  margin-right: .45rem; }
.legend i.dashed { border-top: .12rem dashed var(--faint); }
dl { display: grid; gap: .9rem 2rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
dt { font-weight: 600; font-size: .92rem; }
dd { margin: .1rem 0 0; font-size: .88rem; color: var(--faint); }
details { margin: 1rem 0; }
summary { cursor: pointer; font-weight: 600; padding: .25rem 0; }
.pictures { display: grid; gap: 1.25rem 1.75rem; margin-top: .75rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, calc(var(--columns) * 9rem)), 1fr)); }
.pictures .pair { margin: 0; display: flex; flex-direction: column; justify-content: space-between; }
.pictures .row { display: grid; gap: .5rem; grid-template-columns: repeat(var(--columns), minmax(5.5rem, 11rem));
  overflow-x: auto; }
.pictures img, .pictures .absent { display: block; width: 100%; aspect-ratio: 1; object-fit: contain;
  border-radius: .35rem; background: var(--card); }
.pictures .absent { display: grid; place-items: center; color: var(--faint); font-size: .8rem; }
.pictures .column { font-size: .78rem; color: var(--faint); overflow-wrap: anywhere; line-height: 1.3; }
.pictures .caption { font-size: .88rem; margin: 0 0 .35rem; color: var(--ink); }
.pictures .caption span { color: var(--faint); }
@media print { nav { display: none; } h2 { break-after: avoid; } .panel, .pair { break-inside: avoid; } }
"""
