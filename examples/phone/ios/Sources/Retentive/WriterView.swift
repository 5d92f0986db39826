#if canImport(SwiftUI)
import SwiftUI

/// A prompt, the text that a RetNet writes on, how fast it does, and what its state takes.
public struct WriterView: View {
    @StateObject private var writer: Writer
    @State private var prompt = ""

    /// The model in a folder, as a rule `Bundle.main.path(forResource: "model", ofType: nil)!`.
    public init(folder: String) {
        _writer = StateObject(wrappedValue: Writer(folder: folder))
    }

    public var body: some View {
        VStack(alignment: .leading, spacing: 12) {
            TextField("How does the text begin?", text: $prompt, axis: .vertical)
                .textFieldStyle(.roundedBorder)
                .disabled(writer.writing)
            Button(writer.writing ? "Stop" : "Write") {
                if writer.writing { writer.stop() } else { writer.write(after: prompt) }
            }
            Text(writer.numbers).font(.caption).monospacedDigit()
            ScrollView {
                Text(writer.text).textSelection(.enabled).frame(maxWidth: .infinity, alignment: .leading)
            }
        }
        .padding()
    }
}

@MainActor
final class Writer: ObservableObject {
    @Published var text = ""
    @Published var numbers = ""
    @Published var writing = false
    private let folder: String
    private var task: Task<Void, Never>?

    init(folder: String) {
        self.folder = folder
    }

    func stop() {
        task?.cancel()
    }

    /// The work is done away from the main thread; a model is opened for each text, and closed after it.
    func write(after prompt: String) {
        text = prompt
        writing = true
        let folder = self.folder
        task = Task.detached(priority: .userInitiated) { [weak self] in
            do {
                let net = try RetNet(folder: folder)
                try net.read(prompt)
                let started = Date()
                var tokens = 0
                while !Task.isCancelled, tokens < 2000, let more = try net.write(temperature: 0.8) {
                    tokens += 1
                    let rate = Double(tokens) / Date().timeIntervalSince(started)
                    let line = String(format: "%.1f tokens/s, %lld read and written, state: %lld bytes",
                                      rate, net.position, net.stateBytes)
                    await self?.show(more, line)
                }
            } catch {
                await self?.show("", error.localizedDescription)
            }
            await self?.finish()
        }
    }

    private func show(_ more: String, _ line: String) {
        text += more
        numbers = line
    }

    private func finish() {
        writing = false
    }
}
#endif
