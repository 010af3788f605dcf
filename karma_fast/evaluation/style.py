"""The page that holds a report, and its look: light, dark and printed, from a phone's width up."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
$body
</main>
</body>
</html>
"""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1b1d21; --soft: #5d636e; --rule: #e3e4e6; --fill: #f3f4f5; --mark: #e4eefb;
  --accent: #2464b4; --heat: #123f7d; --warn: #9a4b00; --warnfill: #fdf3e4;
  --act: #2464b4; --gen: #0f8a6a; --rec: #c4501b; --vis: #7d4fb5;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #15171a; --ink: #e6e7e9; --soft: #9ba1ab; --rule: #2e3238; --fill: #1e2125; --mark: #1d3250;
    --accent: #6fa8ee; --heat: #8fc1ff; --warn: #f0b26a; --warnfill: #2d2418;
    --act: #6fa8ee; --gen: #46c3a0; --rec: #ef8a58; --vis: #b592e6;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: anywhere;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 72px; }
section + section { margin-top: 52px; }
h1 { font-size: 16px; font-weight: 600; color: var(--soft); margin: 0 0 14px; }
h2 { font-size: 22px; line-height: 1.25; font-weight: 650; letter-spacing: -.01em; margin: 0 0 14px;
  padding-top: 18px; border-top: 1px solid var(--rule); }
h3 { font-size: 16px; font-weight: 650; margin: 0 0 12px; }
h4 { font-size: 14px; font-weight: 500; color: var(--soft); margin: 0 0 6px; }
p { margin: 0 0 14px; max-width: 46em; }
p.lead { font-size: 27px; line-height: 1.28; font-weight: 650; letter-spacing: -.015em; max-width: 36em;
  margin-bottom: 16px; text-wrap: pretty; }
p.note { font-size: 14px; line-height: 1.5; color: var(--soft); margin-top: 12px; max-width: 56em; }
p.warning { color: var(--warn); background: var(--warnfill); padding: 10px 14px; border-radius: 6px; }
.scroll { overflow-x: auto; max-width: 100%; }
* + .scroll { margin-top: 18px; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums lining-nums; }
th, td { padding: 8px 14px; text-align: right; border-bottom: 1px solid var(--rule); font-weight: 400; }
table.numbers th, table.numbers td { white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 10px; }
thead th { font-size: 14px; color: var(--soft); vertical-align: bottom; padding-top: 4px; }
table.numbers tbody th { max-width: 20em; overflow: hidden; text-overflow: ellipsis; }
table.prose td, table.prose th { text-align: left; vertical-align: top; }
table.prose tbody th { color: var(--soft); white-space: nowrap; }
tr.strong { background: var(--fill); }
tr.strong th { font-weight: 650; }
td.best bdi { font-weight: 650; background: var(--mark); border-radius: 4px; padding: 2px 6px; margin-right: -6px; }
td.bar { width: 240px; min-width: 120px; }
td.bar i { display: block; height: 10px; min-width: 1px; background: var(--accent); border-radius: 0 3px 3px 0; }
figure { margin: 0; min-width: 0; }
figcaption { display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 12px; font-size: 15px;
  margin-bottom: 6px; }
figcaption b { font-weight: 600; }
figcaption small { flex-basis: 100%; font-size: 13.5px; color: var(--soft); }
figcaption span { color: var(--soft); font-variant-numeric: tabular-nums; white-space: nowrap; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(245px, 100%), 1fr)); gap: 28px 26px; }
svg { font-family: inherit; }
svg.chart { display: block; width: 100%; max-width: 400px; height: auto; }
.s-act { --c: var(--act); } .s-gen { --c: var(--gen); } .s-rec { --c: var(--rec); } .s-vis { --c: var(--vis); }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.tick { font-size: 10.5px; fill: var(--soft); font-variant-numeric: tabular-nums; }
.line { fill: none; stroke: var(--c, var(--accent)); stroke-width: 1.6; stroke-linejoin: round;
  stroke-linecap: round; }
.dot { fill: var(--c, var(--accent)); }
.name { font-size: 11.5px; font-weight: 600; fill: var(--c, var(--ink)); }
.maps { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(var(--map), 100%), 1fr));
  gap: 28px; margin: 8px 0; }
svg.heat, svg.legend { display: block; max-width: none; }
.cells { fill: var(--heat); shape-rendering: crispEdges; }
.field { fill: var(--fill); shape-rendering: crispEdges; }
.label { font-size: 10.5px; fill: var(--ink); }
.label.top { fill: var(--soft); }
article { border: 1px solid var(--rule); border-radius: 8px; padding: 18px 20px; margin-bottom: 18px; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 18px 36px; }
ul, ol { margin: 0; padding: 0 0 0 1.6em; }
ul { list-style: none; padding: 0; }
li { padding: 3px 0; }
li.more { color: var(--soft); font-size: 14px; }
ol li > * { vertical-align: top; }
ol li span { display: inline-block; width: calc(100% - 4.2em); }
ol li data { display: inline-block; width: 4.2em; text-align: right; color: var(--soft);
  font-variant-numeric: tabular-nums; }
li.hit span { font-weight: 650; }
li.hit em { font-style: normal; font-size: 13px; font-weight: 600; color: var(--accent); background: var(--mark);
  border-radius: 4px; padding: 1px 7px; margin-left: 4px; white-space: nowrap; }
dl { display: grid; grid-template-columns: minmax(120px, 17em) 1fr; gap: 6px 20px; margin: 16px 0 0; padding-top: 14px;
  border-top: 1px solid var(--rule); }
dt { color: var(--soft); }
dd { margin: 0; }
pre { font: 13.5px/1.55 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; margin: 16px 0 0;
  background: var(--fill); border-radius: 8px; padding: 16px 18px; overflow-wrap: normal; columns: 3 19em; }
@media (max-width: 640px) {
  main { padding: 24px 16px 48px; }
  section + section { margin-top: 40px; }
  p.lead { font-size: 22px; }
  h2 { font-size: 20px; }
  th, td { padding: 8px 7px; }
  td.bar { width: 120px; min-width: 80px; }
  table { font-size: 15px; }
  dl { grid-template-columns: 1fr; gap: 2px; }
  dd { margin-bottom: 8px; }
  table.numbers thead th:first-child, table.numbers tbody th { position: sticky; left: 0; background: var(--paper); }
  table.numbers tr.strong th { background: var(--fill); }
  pre { columns: 1; }
}
@media print {
  :root { --paper: #fff; }
  main { max-width: none; padding: 0; }
  body { font-size: 11pt; }
  figure, article, table, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  .charts { grid-template-columns: 1fr 1fr; }
  .maps { grid-template-columns: 1fr; }
  svg.heat { width: 100%; max-width: 480px; height: auto; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
"""
