"""A receiver of the webhook: it takes what is signed, and each message once."""

import json, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from bgworker import Scheduler, WebhookSink
from bgworker.webhook import VerificationError, new_secret, verify

SECRET = new_secret()                          # once, for the settings of both sides
done = set()                                   # ids of messages; the same one may come again

class Hook(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        try:
            message_id = verify(SECRET, self.headers, body)
        except VerificationError as error:
            return self.send_error(401, str(error))
        if message_id not in done:
            for event in json.loads(body):
                print(event["type"], event["id"], event["data"]["time"])
            done.add(message_id)
        self.send_response(204)                # any 2xx: taken
        self.end_headers()

server = ThreadingHTTPServer(("127.0.0.1", 0), Hook)
threading.Thread(target=server.serve_forever).start()
with Scheduler() as pool:
    pool.register_sink(WebhookSink(f"http://127.0.0.1:{server.server_port}/hook", secret=SECRET))
    pool.submit(print, "hello")
server.shutdown()
server.server_close()
