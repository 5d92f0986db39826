import CRetentive
import Foundation

/// A RetNet that reads a text and writes on, over the functions of retentive.h; for one task at a time.
public final class RetNet {
    public struct Failure: LocalizedError {
        let why: String
        public var errorDescription: String? { why }
    }

    private let model: OpaquePointer
    private var states: OpaquePointer
    private var logits: [Float]
    private var random = UInt64.random(in: 0...UInt64.max)
    private var ready = false
    private var rest = Data()  // the first bytes of a letter whose others are still to come

    /// The model in a folder, read by so many threads; 0 for as many as there are cores.
    public init(folder: String, threads: Int32 = 0) throws {
        var error = [CChar](repeating: 0, count: 256)
        guard let model = retentive_open(folder, threads, &error) else { throw Failure(why: String(cString: error)) }
        guard let states = retentive_states(model, 1) else {
            retentive_close(model)
            throw Failure(why: "no memory for the state")
        }
        self.model = model
        self.states = states
        logits = [Float](repeating: 0, count: Int(retentive_vocabulary(model)))
    }

    deinit {
        retentive_free(states)
        retentive_close(model)
    }

    /// Tokens that were read and written.
    public var position: Int64 { retentive_position(states, 0) }

    /// Bytes that all of these take: as many after a million tokens as after one.
    public var stateBytes: Int64 { retentive_bytes(states) }

    /// Reads a text, after all that was read and written before.
    public func read(_ text: String) throws {
        let bytes = Int64(text.utf8.count)
        var ids = [Int64](repeating: 0, count: Int(bytes) + 1)
        let count = retentive_encode(model, text, bytes, &ids)
        if count < 0 { throw Failure(why: "this model's tokenizer.json is missing, or none that is known here") }
        ids.removeLast(ids.count - Int(count))
        if position == 0, retentive_end(model) >= 0 { ids.insert(retentive_end(model), at: 0) }  // as in training
        rest = Data()
        if !ids.isEmpty { try take(ids) }
    }

    /// What one more token adds to the text, nil where that ends: the likeliest at temperature 0, else a drawn one.
    /// It may be empty, until a letter is whole.
    public func write(temperature: Double) throws -> String? {
        guard ready else { throw Failure(why: "read a text first") }
        let id = try pick(temperature)
        if id == retentive_end(model) { return nil }
        var length: Int64 = 0
        if let bytes = retentive_text(model, id, &length) { rest.append(Data(bytes: bytes, count: Int(length))) }
        try take([id])
        return decoded()
    }

    /// Keeps what was read in a file, which goes between phones, the command line and the server.
    public func save(to file: String) throws {
        var error = [CChar](repeating: 0, count: 256)
        if retentive_save(states, 0, file, &error) == 0 { throw Failure(why: String(cString: error)) }
    }

    /// Goes on from a file: read a text next.
    public func load(from file: String) throws {
        var error = [CChar](repeating: 0, count: 256)
        if retentive_load(states, 0, file, &error) == 0 { throw Failure(why: String(cString: error)) }
        ready = false
    }

    /// Begins anew.
    public func forget() throws {
        guard let fresh = retentive_states(model, 1) else { throw Failure(why: "no memory for the state") }
        retentive_free(states)
        states = fresh
        ready = false
    }

    private func take(_ ids: [Int64]) throws {
        if retentive_read(states, 0, ids, Int64(ids.count), &logits) == 0 {
            throw Failure(why: "the text could not be read: unknown tokens, or no memory")
        }
        ready = true
    }

    /// A token after all that was read. The least likely ones, which are 5 % together, are not drawn.
    private func pick(_ temperature: Double) throws -> Int64 {
        var how = RetentiveSampling(temperature: temperature, top_k: 0, top_p: 0.95, min_p: 0)
        let id = retentive_sample(logits, Int64(logits.count), &how, &random)
        if id < 0 { throw Failure(why: "the model's logits are not finite") }
        return id
    }

    /// All whole letters of `rest`; what may still become one, of four bytes at most, is left there.
    private func decoded() -> String {
        for kept in 0...min(3, rest.count) {
            if let text = String(data: rest.dropLast(kept), encoding: .utf8) {
                rest = Data(rest.suffix(kept))
                return text
            }
        }
        let text = String(decoding: rest, as: UTF8.self)  // bytes that are no text
        rest = Data()
        return text
    }
}
