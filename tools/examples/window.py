"""A window that shows tasks and cancels them; it polls, so it never blocks."""

import tkinter
from tkinter import ttk
from bgworker import LifecycleEvent, Scheduler, StreamEvent, current_task

tasks = {}

def work(steps):
    for step in range(steps):
        current_task().sleep(0.1)              # a cancel wakes it
        current_task().progress(step + 1, steps, f"step {step + 1} of {steps}")

def start():
    task = pool.submit(work, 50)
    tasks[task.id] = task
    table.insert("", "end", task.id, text=task.name)

def cancel():
    for each in table.selection():
        tasks[each].cancel()

def poll():
    for event in subscription.poll():          # never waits: the window stays alive
        if isinstance(event, LifecycleEvent):
            table.set(event.task_id, "status", event.task.status)
        elif isinstance(event, StreamEvent):
            table.set(event.task_id, "progress", event.message)
    root.after(50, poll)

root = tkinter.Tk()
table = ttk.Treeview(root, columns=("status", "progress"))
table.pack()
tkinter.Button(root, text="Start", command=start).pack()
tkinter.Button(root, text="Cancel", command=cancel).pack()
with Scheduler(2) as pool:
    types = ["TaskStarted", "TaskProgress", "TaskCompleted", "TaskCancelled"]
    subscription = pool.subscribe(types=types)
    poll()
    root.mainloop()                            # until the window is closed
    pool.shutdown(cancel_futures=True, timeout=1)
