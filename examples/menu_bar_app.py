"""A macOS menu bar app (pip install rumps): a worker thread generates, the menu asks and stops."""

import sys
import threading

from mlx_diffusiongemma import Commit, Draft, load, stream


class Worker:
    """Answers one question at a time; `text` is what there is of the answer, and can be read from any thread."""

    def __init__(self, model, processor):
        self.loaded, self.text, self.thread, self.cancel = (model, processor), "", None, threading.Event()

    def ask(self, question):
        self.stop()
        self.text, self.cancel = "", threading.Event()
        self.thread = threading.Thread(target=self.run, args=(question, self.cancel))
        self.thread.start()

    def stop(self):
        self.cancel.set()  # takes effect within one denoising step
        if self.thread:
            self.thread.join()

    def run(self, question, cancel, certain=""):
        for event in stream(*self.loaded, question, cancel=cancel):
            if isinstance(event, Draft | Commit):
                self.text = certain + event.text
            certain = self.text if isinstance(event, Commit) else certain


if __name__ == "__main__":
    import rumps

    worker, app = Worker(*load(sys.argv[1])), rumps.App("DiffusionGemma", title="DG")
    rumps.clicked("Ask…")(lambda _: worker.ask(rumps.Window("Ask").run().text))
    rumps.clicked("Stop")(lambda _: worker.stop())
    rumps.Timer(lambda _: setattr(app, "title", worker.text[-60:] or "DG"), 0.1).start()
    app.run()
