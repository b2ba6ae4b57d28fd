"""A progress page of your own: what tasks say, served while they run."""

import html, threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from bgworker import LifecycleEvent, Scheduler, current_task

rows = {}                                      # task id -> name, status, percent, message

def work(steps):
    for step in range(steps):
        current_task().sleep(0.1)
        current_task().progress(step + 1, steps, f"step {step + 1} of {steps}")

def note(event):                               # on a thread of the subscription's own
    row = rows.setdefault(event.task_id, ["", "", 0, ""])
    if isinstance(event, LifecycleEvent):
        row[:2] = event.task.name, event.task.status
    else:
        row[2:] = event.percent or 0, event.message

class Page(BaseHTTPRequestHandler):
    def do_GET(self):
        lines = [f"<tr><td>{html.escape(name)}<td>{status}"
                 f"<td><progress max=100 value={percent}></progress><td>{html.escape(message)}"
                 for name, status, percent, message in list(rows.values())]
        page = f"<!doctype html><title>Tasks</title><table>{''.join(lines)}</table>"
        self.send_response(200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Refresh", "1")       # the browser asks again every second
        self.end_headers()
        self.wfile.write(page.encode())

server = ThreadingHTTPServer(("127.0.0.1", 0), Page)
threading.Thread(target=server.serve_forever).start()
print(f"http://127.0.0.1:{server.server_port}/", flush=True)
with Scheduler(2) as pool:
    pool.subscribe(note, types=["TaskCreated", "TaskStarted", "TaskProgress", "TaskCompleted"])
    list(pool.map(work, [10, 20, 5]))
server.shutdown()
server.server_close()
