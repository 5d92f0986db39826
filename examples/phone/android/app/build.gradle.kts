plugins {
    id("com.android.application")
}

val exported = rootProject.file(providers.gradleProperty("retentive.folder").get())
require(exported.resolve("c/retentive.h").isFile) {
    "no folder of `retentive export --to native` at $exported: set retentive.folder in gradle.properties"
}

android {
    namespace = "org.retentive.phone"
    compileSdk = 37
    ndkVersion = "28.2.13676358" // its libraries fit pages of 16 kB, as newer phones have them

    defaultConfig {
        applicationId = "org.retentive.phone"
        minSdk = 28 // the first whose C library has aligned_alloc
        targetSdk = 37
        versionCode = 1
        versionName = "1.0"
        ndk { abiFilters += listOf("arm64-v8a", "x86_64") } // phones, and the emulator on a PC
        externalNativeBuild {
            cmake {
                // for phones since 2018 or so, add "-DINSTRUCTIONS=-march=armv8.2-a+dotprod" and leave x86_64 out
                arguments += listOf("-DRETENTIVE=${exported.absolutePath}", "-DCMAKE_BUILD_TYPE=Release")
            }
        }
    }
    externalNativeBuild { cmake { path = file("src/main/cpp/CMakeLists.txt") } }
    sourceSets.getByName("main") { assets.directories.add(exported.resolve("model").absolutePath) }
    androidResources { noCompress.add("safetensors") }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}
