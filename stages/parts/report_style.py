"""The look of the report: one style sheet, light and dark by the reader's preference, from 360 pixels of width up."""

STYLE = """
:root { --page:#f7f6f2; --card:#fff; --ink:#1c1e22; --muted:#6a6e76; --edge:#e2e0d9; --good:#1b7f4b; --bad:#b3261e;
  --open:#8a6100; --data:#8a8f98; --pretrain:#3b6fd4; --sft:#0f8f8c; --preference:#c27a00; --rl:#c2410c;
  --distill:#7c4dd6; --distill-control:#a89bc4; --evaluate:#5f7a3a; --release:#1b7f4b; }
@media (prefers-color-scheme: dark) { :root { --page:#131519; --card:#1b1e24; --ink:#e8e6e1; --muted:#9aa0aa;
  --edge:#2e323a; --good:#4cc38a; --bad:#ff8279; --open:#e0b252; --data:#7d838d; --pretrain:#6f9dfb; --sft:#3cbdb8;
  --preference:#e6a63c; --rl:#f5814a; --distill:#a583f2; --distill-control:#7a6d99; --evaluate:#9bbb6c;
  --release:#4cc38a; } }
* { box-sizing:border-box; }
html { scroll-behavior:smooth; -webkit-text-size-adjust:100%; }
body { margin:0 auto; max-width:1160px; padding:32px 20px 60px; background:var(--page); color:var(--ink); font:15px/1.55
  system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif; overflow-wrap:anywhere; }
h1 { font-size:44px; line-height:1.1; margin:0 0 10px; letter-spacing:-.02em; }
h2 { font-size:22px; margin:0 0 12px; letter-spacing:-.01em; }
h3 { font-size:15px; margin:20px 0 8px; }
p { margin:0 0 14px; max-width:86ch; }
small { color:var(--muted); font-size:12.5px; }
code, pre { font:13px/1.5 ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace; white-space:pre-wrap; }
.kicker { color:var(--muted); font-size:12px; letter-spacing:.09em; text-transform:uppercase; margin:0 0 6px; }
.facts { color:var(--muted); margin:0 0 4px; }
.verdict { display:inline-block; margin:16px 0 0; padding:8px 16px; border-radius:8px; border:1.5px solid;
  font-weight:600; }
.good, .up { color:var(--good); }
.bad, .down { color:var(--bad); }
.open { color:var(--open); }
.up, .down, .even { font-weight:600; }
.badge { font-weight:600; white-space:nowrap; }
.verdict.bad { background:color-mix(in srgb, var(--bad) 10%, transparent); }
.verdict.good { background:color-mix(in srgb, var(--good) 10%, transparent); }
tr:has(.badge.bad) { background:color-mix(in srgb, var(--bad) 10%, transparent); }
.tiles { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(220px,100%),1fr)); gap:12px; margin:22px 0 0; }
.tiles > div, section { background:var(--card); border:1px solid var(--edge); border-radius:12px; }
.tiles > div { padding:14px 18px; }
.tiles b { display:block; font-size:23px; letter-spacing:-.01em; }
.tiles span { color:var(--muted); font-size:13px; }
nav { display:flex; flex-wrap:wrap; gap:4px 18px; margin:24px 0 16px; font-size:13.5px; }
nav a { color:var(--muted); text-decoration:none; }
nav a:hover { color:var(--ink); text-decoration:underline; }
section { padding:22px 24px 24px; margin:0 0 16px; }
footer { color:var(--muted); font-size:13px; text-align:center; }
.missing { color:var(--muted); border:1px dashed var(--edge); border-radius:8px; padding:10px 14px; max-width:none;
  margin:8px 0; }
.scroll { overflow-x:auto; margin:0 0 8px; }
table { border-collapse:collapse; width:100%; font-variant-numeric:tabular-nums; }
th { text-align:left; font-weight:500; font-size:12.5px; color:var(--muted); }
th, td { padding:8px 14px 8px 0; border-bottom:1px solid var(--edge); vertical-align:top; overflow-wrap:normal; }
td:first-child, th:first-child { padding-left:8px; }
.scores td { white-space:nowrap; }
.dot { display:inline-block; width:10px; height:10px; border-radius:50%; margin-right:7px; }
.grid { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(310px,100%),1fr)); gap:20px 24px;
  margin-top:14px; }
figure { margin:0; min-width:0; }
figcaption { color:var(--muted); font-size:13px; margin-bottom:4px; }
figcaption b { color:var(--ink); margin-right:4px; }
.beside { display:grid; grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr)); gap:24px;
  align-items:center; }
.beside p { font-size:16.5px; }
.stack { display:grid; gap:26px; }
.stack .bars { max-width:620px; }
svg { display:block; width:100%; height:auto; }
svg text { font-size:12px; fill:var(--muted); font-family:inherit; }
svg .value { fill:var(--ink); }
.chart .rule { stroke:var(--edge); }
.chart .axis { stroke:var(--muted); }
.chart polyline { fill:none; stroke-linejoin:round; }
.thin { stroke-width:1; opacity:.35; }
.thick { stroke-width:2.2; }
path.level { stroke:var(--bad); stroke-dasharray:6 4; stroke-width:1.6; }
svg text.level { fill:var(--bad); font-weight:600; }
.bed { fill:var(--edge); opacity:.55; }
.mark { stroke:var(--ink); stroke-width:2.5; }
svg.stacked { height:40px; border-radius:6px; }
.legend { list-style:none; display:flex; flex-wrap:wrap; gap:4px 22px; padding:0; margin:10px 0 0; }
.track { display:grid; grid-template-columns:repeat(auto-fit,minmax(116px,1fr)); row-gap:10px; }
.station text { text-anchor:middle; }
.rail { stroke:var(--muted); stroke-width:5; fill:none; }
.rail.ahead { stroke-dasharray:4 6; stroke:var(--edge); }
.disc { fill:var(--card); }
.ring { fill:none; stroke:var(--edge); stroke-width:8; }
.arc { fill:none; stroke-width:8; stroke-linecap:butt; }
svg .big { font-size:19px; font-weight:650; fill:var(--ink); }
svg .stop { font-size:14px; font-weight:600; fill:var(--ink); }
svg .small { font-size:11.5px; }
.station.ahead .big, .station.ahead .stop { fill:var(--muted); }
.samples { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(340px,100%),1fr)); gap:16px; }
article { border:1px solid var(--edge); border-radius:10px; padding:14px 16px; min-width:0; }
article pre { margin:0 0 8px; font-weight:600; }
.answer { color:var(--muted); margin:0 0 8px; }
.said { display:grid; grid-template-columns:104px 20px minmax(0,1fr); gap:4px; padding:5px 0; border-top:1px solid
  var(--edge); font-size:13.5px; }
.said > span:first-child { white-space:nowrap; }
.pairs { display:grid; grid-template-columns:repeat(auto-fill,minmax(min(220px,100%),1fr)); gap:10px 24px; margin:0; }
.pairs dt { color:var(--muted); font-size:12.5px; }
.pairs dd { margin:0; font-variant-numeric:tabular-nums; }
details { margin-top:20px; }
summary { cursor:pointer; font-weight:600; }
details pre { background:var(--page); border-radius:8px; padding:14px; }
@media (max-width:600px) { body { padding:20px 12px 40px; } section { padding:16px 14px 18px; } h1 { font-size:34px; } }
@media print { body { max-width:none; } section { break-inside:avoid; } nav { display:none; } }
"""
