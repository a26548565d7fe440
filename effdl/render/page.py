"""The frame of a self-contained HTML page: style for light, dark, phone and paper; no script, no network."""

from __future__ import annotations

from effdl.render.markup import Markup, tag

LIGHT = {
    "bg": "#ffffff",
    "ink": "#1a1f24",
    "muted": "#59636c",
    "line": "#dde2e6",
    "before": "#b4bdc5",
    "accent": "#0a6872",
}
DARK = {
    "bg": "#14181b",
    "ink": "#e6eaec",
    "muted": "#9ba6ae",
    "line": "#2d353a",
    "before": "#5b6770",
    "accent": "#56c1cb",
}
_STYLE = """
*{box-sizing:border-box}
html{color-scheme:light dark;-webkit-text-size-adjust:100%}
body{margin:0;background:var(--bg);color:var(--ink);
 font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1120px;margin:0 auto;padding:40px 32px 64px}
h1{font-size:clamp(1.5rem,1.1rem + 1.8vw,2.25rem);line-height:1.2;font-weight:600;letter-spacing:-.015em;
 margin:.35em 0 .4em;text-wrap:balance}
h2{font-size:1.15rem;font-weight:600;margin:56px 0 4px}
h3{font-size:1rem;font-weight:600;margin:28px 0 2px}
figure h3{margin-top:0}
p{margin:.3em 0 .8em;max-width:92ch}
code,pre{font:.88em/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
code,td,th,dd,p,li,h1{overflow-wrap:anywhere}
pre{margin:12px 0;white-space:pre-wrap;padding:14px 16px;border:1px solid var(--line);border-radius:4px;}
.over,.muted,figcaption,.sub{color:var(--muted)}
.over{margin:0;font-size:.9rem}
.over b{color:var(--accent);font-weight:600}
figcaption,.sub{font-size:.87rem}
.tiles{display:grid;grid-template-columns:repeat(4,1fr);margin:28px 0 0;padding:0;
 border-top:2px solid var(--accent);border-bottom:1px solid var(--line)}
.tiles div{padding:16px 20px 18px 0}
.tiles div+div{padding-left:20px;border-left:1px solid var(--line)}
.tiles dt{font-size:.87rem;color:var(--muted)}
.tiles dd{margin:0}
.tiles dd.big{font-size:1.7rem;font-weight:600;line-height:1.3;letter-spacing:-.015em;
 font-variant-numeric:tabular-nums}
.note{border-left:3px solid var(--accent);padding:2px 0 2px 14px;margin:18px 0;max-width:80ch}
table{border-collapse:collapse;width:100%;margin:12px 0;font-variant-numeric:tabular-nums}
th{font-weight:500;color:var(--muted);font-size:.87rem;text-align:left;vertical-align:bottom}
th,td{padding:8px 16px 8px 0;border-bottom:1px solid var(--line)}
td{vertical-align:top}
tbody th{color:var(--ink);font-size:inherit;vertical-align:top;min-width:7.5em}
thead th{overflow-wrap:normal}
th:last-child,td:last-child{padding-right:0}
.n{text-align:right;white-space:nowrap;overflow-wrap:normal}
table.facts{max-width:640px}
.small{font-size:.87rem;font-weight:400}
.steps .name,.steps .result,.steps .muted{white-space:nowrap}
.steps .options{display:block;white-space:normal}
.steps tbody th{max-width:24em}
.steps .why{min-width:12em;overflow-wrap:anywhere}
.tag{display:inline-block;white-space:nowrap}
.tag.kept{color:var(--accent);font-weight:600}
.tag.dropped{font-weight:600;border:1px dashed var(--muted);border-radius:3px;padding:0 6px}
.tag.none{color:var(--muted)}
.charts{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:44px 56px;margin-top:20px}
figure{margin:0;min-width:0;break-inside:avoid}
figcaption{margin:0 0 12px}
svg.chart{display:block;overflow:visible;font-size:13px}
svg text{fill:var(--ink);stroke:var(--bg);stroke-width:4px;stroke-linejoin:round;paint-order:stroke}
svg .label{font-weight:500}
svg .label.dropped,svg .tick,svg .detail,svg .quiet{fill:var(--muted)}
svg .value{font-variant-numeric:tabular-nums}
svg .tick,svg .limit-text{font-size:11.5px;font-variant-numeric:tabular-nums}
svg .grid,svg .track{stroke:var(--line)}
.kept{fill:var(--accent)}
.plain{fill:var(--before)}
svg text.kept,svg text.plain{fill:var(--ink)}
svg .bar.dropped,.key .dropped{fill:var(--bg);stroke:var(--muted);stroke-dasharray:3 2}
svg .dot.dropped{fill:var(--before)}
.inner{fill:var(--ink);fill-opacity:.38}
.mark{stroke:var(--ink);stroke-width:1.5}
.halo{stroke:var(--bg);stroke-width:4}
.interval{stroke:var(--ink);stroke-width:1.5}
.ring{fill:none;stroke:var(--ink);stroke-width:1.5}
.limit{stroke:var(--ink);stroke-dasharray:5 3}
.key{white-space:nowrap;margin-right:14px}
.key svg{vertical-align:-1px;margin-right:5px}
details{margin:10px 0}
summary{cursor:pointer;color:var(--accent)}
summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
details ul{margin:8px 0;padding-left:20px}
footer{margin-top:56px;padding-top:14px;border-top:1px solid var(--line);font-size:.87rem;color:var(--muted)}
@media (max-width:860px){.charts{grid-template-columns:minmax(0,1fr)}
 .tiles{grid-template-columns:repeat(2,1fr)}
 .tiles div:nth-child(3){padding-left:0;border-left:0}
 .tiles div:nth-child(n+3){border-top:1px solid var(--line)}}
@media (max-width:640px){main{padding:24px 16px 48px}h2{margin-top:44px}
 .tiles dd.big{font-size:1.35rem}.tiles div{padding-right:10px}.tiles div+div{padding-left:12px}
 .tiles div:nth-child(3){padding-left:0}
 svg .detail{display:none}
 th,td{padding-right:10px}
 table.facts .n:last-child{white-space:normal}
 table.steps thead{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
 table.steps,table.steps tbody,table.steps tr{display:block}
 table.steps tr{padding:12px 0;border-bottom:1px solid var(--line)}
 .steps .name,.steps .result,.steps .muted{white-space:normal}
 table.steps th,table.steps td{border:0;padding:1px 0;text-align:left}
 table.steps tbody th{display:block;font-weight:600}
 table.steps td{display:inline-block;margin-right:16px}
 table.steps td::before{content:attr(data-label) " ";color:var(--muted);font-size:.87rem}
 table.steps td.result::before,table.steps td.why::before{content:none}
 table.steps td.result,table.steps td.why{display:block}
 table.steps td.empty{display:none}
 table.scroll{display:block;overflow-x:auto}}
@media print{main{max-width:none;padding:0}body{font-size:10.5pt}h2{break-after:avoid;margin-top:28px}
 tr,figure{break-inside:avoid}
 .kept,.plain,.inner{print-color-adjust:exact;-webkit-print-color-adjust:exact}
 details.numbers,details.nodes{display:none}}
"""


def page(title: str, *body: Markup) -> str:
    """Return a whole document.

    Args:
        title: of the window.
        body: what stands in ``<main>``.
    """
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="referrer", content="no-referrer"),
        tag("title", title),
        tag("style", Markup(_colours() + _STYLE)),
    )
    document = tag("html", head, tag("body", tag("main", *body)), lang="en")
    return f"<!DOCTYPE html>\n{document}\n"


def _colours() -> str:
    def root(colours: dict[str, str]) -> str:
        return ":root{" + ";".join(f"--{k}:{v}" for k, v in colours.items()) + "}"

    dark = f"@media screen and (prefers-color-scheme:dark){{{root(DARK)}}}"
    return f"{root(LIGHT)}\n{dark}"
