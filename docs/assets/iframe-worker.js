// Browsers refuse workers to pages opened as files; here the search's worker runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.append(frame)
      this.inside = frame.contentWindow
      const load = (source) =>
        new Promise((loaded, failed) => {
          const script = Object.assign(this.inside.document.createElement("script"), { src: source })
          script.addEventListener("load", loaded)
          script.addEventListener("error", failed)
          this.inside.document.body.append(script)
        })
      // scripts load one after another; unlike a worker's, this importScripts must be awaited
      this.inside.importScripts = (...sources) => sources.reduce((last, each) => last.then(() => load(each)), Promise.resolve())
      this.inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
      this.ready = load(url)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", { data })))
    }

    set onmessage(listener) {
      this.addEventListener("message", listener)
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
