package org.retentive.phone

import android.app.Activity
import android.os.Bundle
import android.os.SystemClock
import android.text.method.ScrollingMovementMethod
import android.widget.Button
import android.widget.EditText
import android.widget.LinearLayout
import android.widget.LinearLayout.LayoutParams
import android.widget.TextView
import java.io.File
import java.io.IOException
import java.util.concurrent.Executors

/** A prompt, the text that a RetNet writes on, how fast it does, and what its state takes. */
class MainActivity : Activity() {
    private val worker = Executors.newSingleThreadExecutor() // a model is for one thread
    private var model: RetNet? = null // the worker's

    @Volatile private var writing = false

    private lateinit var prompt: EditText
    private lateinit var button: Button
    private lateinit var text: TextView
    private lateinit var numbers: TextView

    override fun onCreate(saved: Bundle?) {
        super.onCreate(saved)
        prompt = EditText(this).apply { hint = "How does the text begin?" }
        button = Button(this).apply { isEnabled = false }
        numbers = TextView(this)
        text = TextView(this).apply {
            setTextIsSelectable(true)
            movementMethod = ScrollingMovementMethod()
        }
        val room = (16 * resources.displayMetrics.density).toInt()
        val all = LinearLayout(this).apply {
            orientation = LinearLayout.VERTICAL
            fitsSystemWindows = true // or the system's bars would lie over it
            addView(prompt)
            addView(button)
            addView(numbers)
            addView(text, LayoutParams(LayoutParams.MATCH_PARENT, 0, 1f))
        }
        for (view in listOf(numbers, text)) view.setPadding(room, room / 2, room, room / 2)
        setContentView(all)
        show(false)
        button.setOnClickListener { if (writing) writing = false else write() }
        worker.execute {
            attempt {
                val opened = RetNet(modelFolder().path, 0)
                model = opened
                runOnUiThread {
                    button.isEnabled = true
                    numbers.text = "state: %,d bytes".format(opened.stateBytes())
                }
            }
        }
    }

    override fun onStop() {
        writing = false
        super.onStop()
    }

    override fun onDestroy() {
        writing = false
        worker.execute { model?.close() }
        worker.shutdown()
        super.onDestroy()
    }

    /** Reads the prompt into a state that has read nothing, and writes until the text ends or it is stopped. */
    private fun write() {
        val begin = prompt.text.toString()
        writing = true
        show(true)
        text.text = begin
        worker.execute {
            attempt {
                val net = model ?: return@attempt
                net.forget()
                net.read(begin)
                val started = SystemClock.elapsedRealtimeNanos()
                var tokens = 0
                while (writing && tokens < MOST_TOKENS) {
                    val more = net.write(TEMPERATURE) ?: break
                    tokens++
                    val rate = tokens * 1e9 / (SystemClock.elapsedRealtimeNanos() - started)
                    val line = "%.1f tokens/s, %,d read and written, state: %,d bytes"
                        .format(rate, net.position(), net.stateBytes())
                    runOnUiThread {
                        text.append(more)
                        numbers.text = line
                    }
                }
            }
            writing = false
            runOnUiThread { show(false) }
        }
    }

    private fun show(busy: Boolean) {
        button.text = if (busy) "Stop" else "Write"
        prompt.isEnabled = !busy
    }

    /** What fails is told in the place of the numbers. */
    private fun attempt(work: () -> Unit) {
        try {
            work()
        } catch (error: IOException) {
            runOnUiThread { numbers.text = error.message }
        } catch (error: OutOfMemoryError) {
            runOnUiThread { numbers.text = error.message }
        }
    }

    /**
     * The folder of the model: C opens files, and assets are none, so they are copied when this version of the app
     * first starts; whole or not at all, by a rename.
     */
    private fun modelFolder(): File {
        val version = packageManager.getPackageInfo(packageName, 0).lastUpdateTime
        val folder = File(filesDir, "model-$version")
        if (folder.isDirectory) return folder
        filesDir.listFiles { file -> file.name.startsWith("model-") }?.forEach { it.deleteRecursively() }
        val partial = File(filesDir, "model-partial").apply { mkdirs() }
        for (name in FILES) {
            assets.open(name).use { from -> File(partial, name).outputStream().use { to -> from.copyTo(to) } }
        }
        if (!partial.renameTo(folder)) throw IOException("$folder cannot be written")
        return folder
    }

    private companion object {
        val FILES = listOf("config.json", "model.safetensors", "tokenizer.json")
        const val MOST_TOKENS = 2000
        const val TEMPERATURE = 0.8
    }
}
