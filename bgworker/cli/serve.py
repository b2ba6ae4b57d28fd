"""``bgworker serve``: a history as pages, for a browser on this machine."""

from __future__ import annotations

import os
from argparse import ArgumentTypeError

from .options import add_db, whole
from .reading import bound_memory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from argparse import Namespace
    from typing import Any

HELP = "show a history in a browser, while it is written"

DESCRIPTION = """\
Show a history in a browser, while it is written and after: what runs, what
failed and why, what a task says, what ran when. Prints the address to open,
with a token in it that nobody else knows. It only reads. Ends at Ctrl-C.
"""

EPILOG = """\
exit codes:
  130 interrupted (Ctrl-C); 1 the address cannot be bound; 2 the command line
  is wrong

examples:
  bgworker serve
  bgworker serve --db nightly.db --port 8321
  ssh -L 8321:127.0.0.1:8321 HOST bgworker serve --port 8321
"""

_EXPOSED = (
    "{} can be reached from other machines, and nothing is encrypted: whoever can listen to the "
    "network reads the token, and with it all tasks, what they said, their arguments and their "
    "source. An ssh tunnel is safer: see bgworker serve --help")


def add_arguments(parser: Any) -> None:
    """Describe the words that may follow the verb."""
    add_db(parser)
    parser.add_argument("--host", metavar="ADDRESS", default="127.0.0.1",
                        help="the address to bind (default: 127.0.0.1, for this machine alone)")
    parser.add_argument("--port", metavar="N", type=a_port, default=0,
                        help="the port to bind (default: one that is free)")
    parser.add_argument("--i-know", action="store_true",
                        help="let other machines connect; needed where --host is not this machine")


def a_port(text: str) -> int:
    """Read an option's value as a port."""
    port = whole()(text)
    if port > 65_535:
        raise ArgumentTypeError(f"expected a port from 0 to 65535, got {text!r}")
    return port


def act(options: Namespace) -> int:
    """Serve until Ctrl-C."""
    from ..web.server import Server, is_loopback

    if not is_loopback(options.host):
        options.parser.tell(_EXPOSED.format(options.host))
        if not options.i_know:
            options.parser.error("argument --host: expected an address of this machine alone, "
                                 "such as 127.0.0.1; add --i-know to serve to others")
    try:
        server = Server(options.db, host=options.host, port=options.port)
    except OSError as error:
        options.parser.fail(f"cannot listen at {options.host} port {options.port}: "
                            f"{error.strerror or error}; name another --host or --port")
    bound_memory()
    with server:
        if not os.path.exists(options.db):
            options.parser.tell(f"there is no history at {options.db} yet")
        print(server.url, flush=True)
        server.serve_forever()
    return 0
