"""A game whose state is only in the memory of this process: reach GOAL from 2.

GET /play?move=triple makes a move and answers with the number and the moves so far.
"""

import http.server
import json
import urllib.parse

GOAL = 18
MOVES = {"increment": lambda n: n + 1, "double": lambda n: 2 * n, "triple": lambda n: 3 * n}
number, played = 2, []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        global number
        query = urllib.parse.parse_qs(urllib.parse.urlsplit(self.path).query)
        for move in query.get("move", []):
            number = MOVES[move](number)
            played.append(move)
        body = json.dumps({"number": number, "played": played, "distance": abs(GOAL - number)}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


http.server.HTTPServer(("127.0.0.1", 8000), Handler).serve_forever()
