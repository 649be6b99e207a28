#!/opt/baton/bin/python
"""Ask the gateway of this container whether it can serve; exit 0 if so, 1 with what it said if not.

BATON_HEALTH_URL says where it is, by default http://127.0.0.1:8000/health. By https the certificate
is not checked: it bears the name that users know, not 127.0.0.1, and nothing secret is sent.
"""

import os
import ssl
import sys
import urllib.error
import urllib.request

URL = "http://127.0.0.1:8000/health"
TIMEOUT_S = 4.0


def main() -> int:
    """Ask once, and say what is wrong if something is."""
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    url = os.environ.get("BATON_HEALTH_URL", URL)
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S, context=context):
            return 0
    except urllib.error.HTTPError as error:
        problem = error.read(1000).decode(errors="replace")
    except (OSError, ValueError) as error:
        problem = str(error)
    sys.stderr.write(f"{url}: {problem}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
