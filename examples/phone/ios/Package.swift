// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "Retentive",
    platforms: [.iOS(.v16), .macOS(.v13)],
    products: [.library(name: "Retentive", targets: ["Retentive"])],
    targets: [
        // c/ is that of a folder of `retentive export --to native`, copied here; retentive.c includes all of it
        .target(
            name: "CRetentive",
            sources: ["c/retentive.c"],
            publicHeadersPath: "include",
            cSettings: [.unsafeFlags(["-O3", "-fno-strict-aliasing", "-fno-math-errno", "-fno-trapping-math", "-Wno-unknown-pragmas"])]
        ),
        .target(name: "Retentive", dependencies: ["CRetentive"]),
    ],
    cLanguageStandard: .gnu11
)
