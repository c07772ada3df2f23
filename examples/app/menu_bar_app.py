"""A macOS menu bar app (pip install rumps): the menu asks and stops, the title shows the answer as it forms."""

import sys
from pathlib import Path

import rumps
from engine import Engine

if __name__ == "__main__":
    model = Path.home() / "Library/Application Support/DiffusionGemma/model"
    engine, app = Engine(sys.argv[1] if len(sys.argv) > 1 else model), rumps.App("DiffusionGemma", title="DG")
    rumps.clicked("Ask…")(lambda _: engine.ask(rumps.Window("Ask").run().text))
    rumps.clicked("Stop")(lambda _: engine.stop())
    rumps.Timer(lambda _: setattr(app, "title", engine.text[-60:] or engine.status), 0.1).start()
    app.run()
    engine.stop()
