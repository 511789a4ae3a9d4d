#!/usr/bin/env python3
"""Look at the page of a server with a real browser.

    python page.py --volley target/release/volley --out target/page

Starts the demo model, opens its page in headless Chromium over the DevTools protocol, and does what a person would:
asks for an answer and reads it, stops another one, looks at workers, timeline, conditions, latencies and experts, kills the
server and sees the page say so, starts it again and sees the page come back, gives a key to a server that wants one.

What is checked (exit status 1 if anything fails): each of these in the document itself; that text of the model is shown as text;
that the policy lets no foreign script run; that the console had no error; that a page nobody looks at asks for nothing.
Screenshots, light and dark, go to --out.

Needs Python 3.11 and Chromium (Debian: chromium-headless-shell or chromium), nothing else. Without a browser it says so and
ends with status 77.
"""

import argparse
import base64
import contextlib
import json
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request

BROWSERS = ["chromium-headless-shell", "chromium", "chromium-browser", "google-chrome"]
DEADLINE_S = 60  # of every wait: the machine may be busy
LEFT_OUT = 77


class Browser:
    """One page of a headless browser, spoken to by the DevTools protocol over a pair of pipes."""

    def __init__(self, program, profile):
        there, ours = os.pipe()
        theirs, back = os.pipe()
        flags = ["--headless", "--remote-debugging-pipe", "--no-first-run", "--disable-gpu", "--hide-scrollbars", f"--user-data-dir={profile}"]
        if os.getuid() == 0:
            flags.append("--no-sandbox")  # its sandbox refuses root

        def pipes():
            # The protocol is on descriptors 3 and 4. Moved aside first, lest one overwrite the other.
            incoming, outgoing = os.dup(there), os.dup(back)
            os.dup2(incoming, 3)
            os.dup2(outgoing, 4)

        self.process = subprocess.Popen([program, *flags, "about:blank"], preexec_fn=pipes, close_fds=False, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(there)
        os.close(back)
        self.write, self.read = ours, theirs
        self.number, self.buffer = 0, b""
        self.session = None
        self.console = []
        self.requests = 0
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ["Page", "Runtime", "Log", "Network"]:
            self.call(f"{domain}.enable")

    def call(self, method, **params):
        self.number += 1
        number = self.number
        message = {"id": number, "method": method, "params": params}
        if self.session:
            message["sessionId"] = self.session
        os.write(self.write, json.dumps(message).encode() + b"\0")
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            answer = self.receive(until - time.monotonic())
            if answer and answer.get("id") == number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
        raise TimeoutError(f"the browser has not answered {method} within {DEADLINE_S} s")

    def receive(self, patience):
        while b"\0" not in self.buffer:
            if not select.select([self.read], [], [], max(patience, 0))[0]:
                return None
            piece = os.read(self.read, 1 << 20)
            if not piece:
                raise RuntimeError("the browser has ended")
            self.buffer += piece
        line, self.buffer = self.buffer.split(b"\0", 1)
        message = json.loads(line)
        self.note(message)
        return message

    def note(self, message):
        params = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = params["exceptionDetails"]
                self.console.append(details.get("exception", {}).get("description") or details["text"])
            case "Runtime.consoleAPICalled" if params["type"] in ("error", "warning", "assert"):
                self.console.append(" ".join(str(part.get("value", part.get("description"))) for part in params["args"]))
            case "Log.entryAdded" if params["entry"]["level"] in ("error", "warning"):
                self.console.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.requests += 1

    def run(self, script):
        """The value of an expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in result:
            raise RuntimeError(f"{script}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, what, script):
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            value = self.run(script)
            if value:
                return value
            self.rest(0.1)
        trouble = self.run("document.getElementById('trouble')?.textContent")
        raise AssertionError(f"not seen within {DEADLINE_S} s: {what}; the page says: {trouble!r}; the console: {self.console}")

    def rest(self, seconds):
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.receive(left)

    def open(self, url, width=1440, height=1160, scheme="light"):
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.look(scheme)
        self.call("Page.navigate", url=url)
        self.wait("the page", "document.readyState === 'complete' && !!document.getElementById('pill')")

    def look(self, scheme):
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def type(self, text):
        self.call("Input.insertText", text=text)

    def press(self, key, code=0, text=""):
        for kind in ["keyDown", "keyUp"]:
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **({"text": text} if text and kind == "keyDown" else {}))

    def screenshot(self, file):
        data = self.call("Page.captureScreenshot", format="png")["data"]
        file.write_bytes(base64.b64decode(data))

    def close(self):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Server:
    def __init__(self, volley, *flags, port=0):
        self.process = subprocess.Popen([volley, "serve", "--port", str(port), "--log-level", "error", *flags], stdout=subprocess.PIPE, text=True)
        line = ""
        if select.select([self.process.stdout], [], [], DEADLINE_S)[0]:
            line = self.process.stdout.readline()
        found = re.search(r"http://[^\s]+", line)
        assert found, f"the server does not come up: {line!r}"
        self.url = found[0].rstrip("/")
        self.port = int(self.url.rsplit(":", 1)[1])

    def kill(self):
        self.process.kill()
        self.process.wait()


def text(id):
    return f"document.getElementById('{id}').textContent"


def say(browser, words):
    browser.run("document.getElementById('text').focus()")
    browser.type(words)
    browser.press("Enter", 13, "\r")


ANSWERED = "document.getElementById('stop').hidden && document.querySelectorAll('.said.model').length"


def chat(browser):
    browser.wait("the model's name", f"{text('model')} === 'volley-demo'")
    say(browser, "Speak, <b id=injected>my lord</b><img src=x onerror=alert(1)>.")
    browser.wait("an answer", f"{ANSWERED} === 1 && document.querySelector('.said.model').textContent.length > 20")
    speed = browser.run("document.querySelector('.speed').textContent")
    assert re.search(r"TTFT [\d.]+ m?s · [\d.]+ tokens/s · \d+ tokens · ended by", speed), speed
    assert browser.run("document.getElementById('injected') === null && !document.querySelector('#talk img')"), "text was taken for HTML"
    assert browser.run("document.querySelector('.said.user').textContent.includes('<b id=injected>')")
    return speed


def stop(browser):
    """On a slow line, or the answer would be there before the button is found."""
    slow = {"offline": False, "latency": 0, "uploadThroughput": -1}
    browser.call("Network.emulateNetworkConditions", downloadThroughput=2000, **slow)
    say(browser, "Tell me everything.")
    browser.wait("the second answer's beginning", "document.querySelectorAll('.said.model')[1]?.textContent.length > 0 && !document.getElementById('stop').hidden")
    browser.run("document.getElementById('stop').click()")
    browser.wait("the stop", "/stopped/.test([...document.querySelectorAll('.speed')].at(-1).textContent) && document.getElementById('stop').hidden")
    browser.call("Network.emulateNetworkConditions", downloadThroughput=-1, **slow)


@contextlib.contextmanager
def load(url, streams=12):
    """Clients that have the model write all the time."""
    enough = threading.Event()

    def write(index):
        body = {"prompt": f"{index} KING:", "max_tokens": 200, "ignore_eos": True, "temperature": 1, "seed": index}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
        while not enough.is_set():
            urllib.request.urlopen(request, timeout=DEADLINE_S).read()

    threads = [threading.Thread(target=write, args=[index]) for index in range(streams)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        enough.set()
        for thread in threads:
            thread.join()


def board(browser, attention, expert):
    wanted = [f"attention-{i}" for i in range(attention)] + [f"expert-{i}" for i in range(expert)]
    states = "Object.fromEntries([...document.querySelectorAll('#topology g')].map(node => [node.dataset.worker, node.dataset.state]))"
    browser.wait("every worker alive", f"(states => {json.dumps(wanted)}.every(name => states[name] === 'alive'))({states})")
    words = browser.wait("steps in the timeline", f"/^\\d+ steps? of .* median/.test({text('timeline-words')}) && {text('timeline-words')}")
    painted = "(canvas => { const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data; return new Set(new Uint32Array(pixels.buffer)).size })(document.getElementById('%s'))"
    assert browser.run(painted % "timeline") > 4, "the timeline is empty"
    browser.wait("rows of experts", f"/Hottest: expert \\d+ of layer \\d+/.test({text('experts-words')})")
    assert browser.run(painted % "experts") > 4, "the heat map is empty"
    browser.wait("three lights that know", "document.querySelectorAll('#conditions li:not([data-light=unknown])').length === 3")
    browser.wait("latencies", "/s$/.test(document.querySelector('[data-latency=\"first token\"] td').textContent)")
    browser.wait("tiles", "Number(document.querySelector('[data-tile=epoch] dd').textContent) >= 1")
    # The timeline by keyboard: a zoom holds it.
    browser.run("document.getElementById('timeline').focus()")
    browser.press("+", 187, "+")
    assert browser.run("document.getElementById('hold').getAttribute('aria-pressed')") == "true"
    browser.run("document.getElementById('hold').click(); document.activeElement.blur()")
    return words


def policy(browser):
    """A script that was put in from elsewhere must not run; the console says so, which is wanted here."""
    before = len(browser.console)
    browser.run("document.body.append(Object.assign(document.createElement('script'), {textContent: 'window.injected = 1'}))")
    assert browser.run("window.injected === undefined"), "the policy lets a foreign script run"
    browser.rest(0.3)
    del browser.console[before:]


def quiet(browser):
    """Nothing is asked for while nobody looks."""
    browser.run("Object.defineProperty(document, 'hidden', {value: true, configurable: true}); 0")
    browser.rest(1.5)
    before = browser.requests
    browser.rest(2.5)
    assert browser.requests == before, f"{browser.requests - before} requests of a page that is hidden"
    browser.run("delete document.hidden; document.dispatchEvent(new Event('visibilitychange'))")


def restart(browser, server, volley, flags):
    server.kill()
    browser.wait("the trouble", "!document.getElementById('trouble').hidden && /does not answer/.test(document.getElementById('trouble').textContent)")
    assert browser.run("document.querySelectorAll('#tiles dd, #topology g, #latency td').length") == 0, "numbers of a dead server are shown"
    # What the browser itself says of refused connections is wanted here.
    again = Server(volley, *flags, port=server.port)
    browser.wait("the page to come back", "document.getElementById('trouble').hidden && document.querySelectorAll('#topology g').length > 0")
    browser.rest(0.3)
    browser.console[:] = [line for line in browser.console if "ERR_CONNECTION_REFUSED" not in line and "ERR_CONNECTION_RESET" not in line and "ERR_EMPTY_RESPONSE" not in line and "ERR_INCOMPLETE" not in line]
    return again


def key(browser, volley, work):
    file = work / "key"
    file.write_text("a-key-of-the-test")
    server = Server(volley, "--api-key-file", str(file))
    try:
        browser.open(server.url)
        browser.wait("the question for the key", "!document.getElementById('key-form').hidden")
        assert browser.run("document.querySelectorAll('#topology g').length") == 0
        browser.run("document.getElementById('key').focus()")
        browser.type("a-key-of-the-test")
        browser.press("Enter", 13, "\r")
        browser.wait("the workers behind the key", "document.querySelectorAll('#topology g').length === 2")
        browser.rest(0.3)
        browser.console[:] = [line for line in browser.console if "401" not in line]
    finally:
        server.kill()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--volley", default="target/release/volley")
    parser.add_argument("--out", default="target/page", type=pathlib.Path, help="folder for the screenshots")
    parser.add_argument("flags", nargs="*", help="more flags of `volley serve`")
    args = parser.parse_args()
    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        print(f"left out: no browser is here ({', '.join(BROWSERS)})")
        return LEFT_OUT
    args.out.mkdir(parents=True, exist_ok=True)
    flags = ["--attention-workers", "2", "--expert-workers", "3", "--micro-batches", "3", "--micro-batch-rows", "1", *args.flags]
    server = browser = None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
        work = pathlib.Path(work)
        try:
            server = Server(args.volley, *flags)
            browser = Browser(program, work / "profile")
            browser.open(server.url)
            print("ok: the chat:", chat(browser))
            stop(browser)
            print("ok: an answer is stopped")
            with load(server.url):
                print("ok: the board:", board(browser, 2, 3))
                # Hops are known after ten seconds; those of other processes stand in their own metrics.
                browser.wait("a hop", f"/slowest hop attention-\\d+|in the metrics of each/.test({text('topology-words')})")
                browser.screenshot(args.out / "light.png")
                browser.look("dark")
                browser.rest(1.5)
                browser.screenshot(args.out / "dark.png")
            policy(browser)
            print("ok: a foreign script does not run")
            quiet(browser)
            print("ok: a hidden page asks for nothing")
            server = restart(browser, server, args.volley, flags)
            print("ok: the server goes and comes back")
            key(browser, args.volley, work)
            print("ok: a server that wants a key")
            assert not browser.console, f"the console says: {browser.console}"
            print(f"ok: the console is empty; screenshots are in {args.out}")
        except (AssertionError, RuntimeError, TimeoutError) as error:
            if browser:
                with contextlib.suppress(Exception):
                    browser.screenshot(args.out / "failed.png")
            print(f"FAILED: {error}")
            return 1
        finally:
            if browser:
                browser.close()
            if server:
                server.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main())
