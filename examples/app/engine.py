"""An app's engine, without a window: one worker thread loads the model and answers questions, one after the other.

python examples/app/engine.py CHECKPOINT "Why is the sky blue?"
"""

import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

from mlx_diffusiongemma import Commit, DiffusionGemmaError, Draft, MemoryWarning, load, stream


class Engine:
    """`status` and `text`, what there is of the answer, can be read from any thread."""

    def __init__(self, path):
        self.status, self.text, self.cancel, self.worker = "Loading", "", threading.Event(), ThreadPoolExecutor(1)
        self.worker.submit(self._told, self._load, path)

    def ask(self, question):
        self.stop()
        self.cancel = threading.Event()
        return self.worker.submit(self._told, self._answer, question, self.cancel)

    def stop(self):
        self.cancel.set()  # takes effect within one denoising step

    def _told(self, work, *arguments):
        try:
            self.status = work(*arguments)
        except (DiffusionGemmaError, OSError) as error:
            self.status = str(error)  # one sentence that says what to do

    def _load(self, path):
        with warnings.catch_warnings(record=True, action="always", category=MemoryWarning) as caught:
            self.model, self.processor = load(path, progress=self._progress)
        return " ".join(str(warning.message) for warning in caught) or "Ready"

    def _progress(self, done, total):
        self.status = f"Loading: {done} of {total} layers"

    def _answer(self, question, cancel, certain=""):
        self.text = ""
        for event in stream(self.model, self.processor, question, cancel=cancel):
            if isinstance(event, Draft | Commit):
                self.text = certain + event.text
            certain = self.text if isinstance(event, Commit) else certain
        return "Stopped" if cancel.is_set() else "Ready"


if __name__ == "__main__":
    engine = Engine(sys.argv[1])
    engine.ask(sys.argv[2]).result()
    engine.worker.shutdown()
    print(engine.text or engine.status)
