"""The style sheet of the page: one column of text, panels that wrap, light and dark by the reader's own setting."""

from __future__ import annotations

from consilium.report.maps import RAMP
from consilium.report.style import DARK, LIGHT

__all__ = ["STYLE"]


def _theme(name: str, palette: dict[str, str], extra: str) -> str:
    colors = "".join(f"--{role}:{code};" for role, code in palette.items())
    return f"{colors}--ramp:linear-gradient(90deg,{','.join(RAMP[name])});{extra}color-scheme:{name};"


_LIGHT = _theme("light", LIGHT, "--page:#f3f4f2;--soft:#eceeec;--line:#d5dade;--warn:#fdf1d8;--best:#e0eefa;")
_DARK = _theme("dark", DARK, "--page:#121519;--soft:#23282e;--line:#363d45;--warn:#3a3018;--best:#173349;")

STYLE = (
    ":root{--font:system-ui,-apple-system,'Segoe UI',Roboto,'Noto Sans','Liberation Sans',sans-serif;"
    + _LIGHT
    + "}@media (prefers-color-scheme:dark){:root{"
    + _DARK
    + "}.only-light{display:none}}@media (prefers-color-scheme:light){.only-dark{display:none}}"
    + "@media print{:root{"
    + _LIGHT
    + "}.only-light{display:inline}.only-dark{display:none}.tall{max-height:none}}"
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-behavior:smooth}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 var(--font)}
main,header,footer{max-width:1240px;margin:0 auto;padding:0 clamp(12px,3vw,32px)}
header{padding-top:32px}
h1{font-size:clamp(1.5rem,1.1rem + 1.8vw,2.2rem);line-height:1.15;margin:0 0 6px;letter-spacing:-.015em;
 overflow-wrap:anywhere}
h2{font-size:1.4rem;margin:48px 0 14px;letter-spacing:-.01em}
h3{font-size:1.06rem;margin:0 0 4px}
h4{font-size:.88rem;font-weight:600;margin:0 0 4px;overflow-wrap:anywhere}
p{margin:0 0 10px}
a{color:var(--c0)}
pre{font:12px/1.45 ui-monospace,'DejaVu Sans Mono',monospace;white-space:pre-wrap;
overflow-wrap:anywhere;margin:0 0 10px}
code{font:.92em ui-monospace,'DejaVu Sans Mono',monospace;overflow-wrap:anywhere}
.sub,.muted{color:var(--muted)}
.sub{overflow-wrap:anywhere}
nav{display:flex;flex-wrap:wrap;gap:6px 18px;margin-top:16px;font-size:.93rem}
.badge{display:inline-block;border:1px solid var(--line);border-radius:99px;padding:0 10px;font-size:.85rem;
 vertical-align:.25em;color:var(--muted);letter-spacing:0;font-weight:500;white-space:nowrap}
.warn{background:var(--warn);border-radius:8px;padding:10px 14px;margin:14px 0 0;overflow-wrap:anywhere}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,180px),1fr));gap:10px;margin:20px 0 0}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:12px 14px;min-width:0}
.card b{display:block;font-size:1.5rem;line-height:1.25;letter-spacing:-.015em;font-variant-numeric:tabular-nums;
 overflow-wrap:anywhere}
.card span{display:block;font-size:.86rem;color:var(--muted);overflow-wrap:anywhere}
.card .what{color:var(--ink)}
figure,.box{background:var(--panel);border:1px solid var(--line);border-radius:10px;margin:0 0 16px;
 padding:clamp(12px,1.6vw,20px)}
figcaption{max-width:88ch;font-size:.93rem;color:var(--muted);margin-bottom:10px}
figcaption b{color:var(--ink);font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:.88rem;margin:0 0 12px;padding:0;list-style:none}
.legend li{display:flex;align-items:center;gap:7px;min-width:0;overflow-wrap:anywhere}
.legend svg{flex:none}
.ramp{display:inline-block;width:150px;height:12px;border-radius:3px;background:var(--ramp);
 border:1px solid var(--line)}
.scale{display:flex;justify-content:space-between;width:150px;font-size:.8rem;color:var(--muted)}
.panels{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:18px 26px}
.panels.two{grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),450px))}
.panel{min-width:0;display:flex;flex-direction:column}
.note{color:var(--muted);font-size:.9rem;margin:0 0 12px}
.below{margin:12px 0 0;max-width:110ch}
.next{margin-top:26px}
figcaption p{margin:0 0 4px}
.panel svg{display:block;width:100%;height:auto;max-width:calc(var(--natural)*1.38)}
svg text{font-family:var(--font)}
.each{margin:14px 0 0}
.each+.each{border-top:1px solid var(--line);padding-top:12px}
.each h4{font-size:.98rem}
.none{border:1px dashed var(--line);border-radius:8px;padding:12px 14px;color:var(--muted);font-size:.93rem;margin:0}
figure figure{border:0;padding:0;margin:0;border-radius:0}
figure>details{border-top:1px solid var(--line);padding:12px 0}
figure>details:last-child{padding-bottom:0}
.scroll{overflow-x:auto;max-width:100%;
 background:linear-gradient(to left,var(--panel) 30%,transparent) 100% 0/48px 100% no-repeat local,
 linear-gradient(to left,var(--line),transparent) 100% 0/18px 100% no-repeat scroll}
.tall{max-height:470px;overflow:auto}
table{border-collapse:separate;border-spacing:0;font-size:.92rem;width:100%;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:6px 12px;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;white-space:nowrap}
thead th{color:var(--muted);font-size:.84rem;position:sticky;top:0;background:var(--panel)}
tbody tr:last-child>*{border-bottom:0}
.num{text-align:right;white-space:nowrap}
.best{background:var(--best);font-weight:600}
.starred .num{padding-right:24px;position:relative}
.starred .best::after{content:"★";color:var(--c0);position:absolute;right:7px;top:6px}
.num small{display:block;color:var(--muted);font-weight:400;font-size:.84rem}
tbody th{position:sticky;left:0;background:var(--panel)}
.wrap{overflow-wrap:anywhere;min-width:12ch}
.long{min-width:22ch}
.id{white-space:nowrap}
.same>*{color:var(--muted)}
tr.differs>th{color:var(--c1)}
details>summary{cursor:pointer;font-weight:600;padding:2px 0}
details[open]>summary{margin-bottom:10px}
.dot{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.45em}
dt{font-weight:600}
dd{margin:0 0 8px;color:var(--muted);max-width:88ch}
footer{color:var(--muted);font-size:.86rem;padding-bottom:40px;margin-top:36px}
@media (max-width:560px){
 tbody th{white-space:normal;min-width:14ch;max-width:40vw;overflow-wrap:anywhere}
 th,td{padding:5px 8px}h2{margin-top:36px}.card b{font-size:1.25rem}
 .cards{grid-template-columns:repeat(2,minmax(0,1fr))}}
"""
)
