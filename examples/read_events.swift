// Generate from Swift: run `mlx-dg generate --json` and read an event from each line.
//
//     swiftc read_events.swift && ./read_events CHECKPOINT "Why is the sky blue?"
import Foundation

struct Event: Decodable {
    let type: String  // prefill, draft, filled, commit or done
    let text: String?  // of a draft or a commit
    let step: Int?
    let max_steps: Int?
    let finish_reason: String?
}

let process = Process()
process.executableURL = URL(fileURLWithPath: "/usr/bin/env")
process.arguments = ["mlx-dg", "generate", "--json", "--model", CommandLine.arguments[1], CommandLine.arguments[2]]
let pipe = Pipe()
process.standardOutput = pipe
try process.run()

var answer = ""
var unread = Data()
while case let new = pipe.fileHandleForReading.availableData, !new.isEmpty {
    unread.append(new)
    while let end = unread.firstIndex(of: UInt8(ascii: "\n")) {  // by bytes: a text may hold other line separators
        let event = try JSONDecoder().decode(Event.self, from: unread[..<end])
        unread = Data(unread[(end + 1)...])
        switch event.type {
        case "draft": print("step \(event.step!)/\(event.max_steps!): \(answer + event.text!)")
        case "commit": answer += event.text!
        case "done": print("\(answer)\n(\(event.finish_reason!))")
        default: break
        }
    }
}
process.waitUntilExit()
exit(process.terminationStatus)
