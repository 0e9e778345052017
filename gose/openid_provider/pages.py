"""What a person sees: plain HTML without scripts, pictures or anything from elsewhere."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b2430; --paper: #f4f6f8; --card: #fff; --line: #d8dee5; --go: #0b5cad; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --paper: #11161c; --card: #1a212a; --line: #2f3a46; --go: #6cb2ff; }
}
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
main { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 2rem 2.5rem; max-width: 30rem;
  margin: 1rem; }
h1 { font-size: 1.35rem; margin: 0 0 .75rem; }
p { margin: .5rem 0; }
code { font-family: ui-monospace, monospace; font-size: .9em; overflow-wrap: anywhere; }
a.go { display: inline-block; margin: 1.25rem 1rem 0 0; padding: .6rem 1.4rem; border-radius: 8px; background: var(--go);
  color: var(--card); text-decoration: none; font-weight: 600; }
a.go:focus-visible { outline: 3px solid var(--ink); outline-offset: 2px; }
small { display: block; margin-top: 1.5rem; opacity: .75; }
"""


def _page(title: str, head: str, body: str) -> str:
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n{head}<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def login_page(*, realm: str, login_url: str, cancel_url: str) -> str:
    """The page that leads to the login over TLS with the card; ``realm`` is who asks."""
    return _page(
        "Log in with your secure element",
        "",
        "<h1>Log in with your secure element</h1>\n"
        f"<p><code>{escape(realm)}</code> asks who you are.</p>\n"
        "<p>The login needs no password: your card proves your identity to a card of this grid, over a TLS connection that both open.</p>\n"
        f'<p><a class="go" id="AutoLogin" href="{escape(login_url)}">Log in</a>'
        f'<a id="Cancel" href="{escape(cancel_url)}">Cancel</a></p>\n'
        "<small>This page is valid for one login, and not for long.</small>\n",
    )


def identity_page(*, title: str, text: str, xrds_url: str, endpoint_url: str, local_id: str = "") -> str:
    """A page that discovery can read (meta http-equiv, link rel), and a person too."""
    head = (
        f'<meta http-equiv="X-XRDS-Location" content="{escape(xrds_url)}">\n'
        f'<link rel="openid2.provider" href="{escape(endpoint_url)}">\n'
    )
    if local_id:
        head += f'<link rel="openid2.local_id" href="{escape(local_id)}">\n'
    return _page(title, head, f"<h1>{escape(title)}</h1>\n<p>{escape(text)}</p>\n")


def problem_page(message: str) -> str:
    """Something that cannot be done, and why."""
    return _page("This login cannot go on", "", f"<h1>This login cannot go on</h1>\n<p>{escape(message)}</p>\n")
