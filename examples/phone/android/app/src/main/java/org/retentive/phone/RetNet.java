package org.retentive.phone;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.CharBuffer;
import java.nio.charset.CharsetDecoder;
import java.nio.charset.CodingErrorAction;
import java.nio.charset.StandardCharsets;
import java.util.Arrays;
import java.util.Random;

/**
 * A RetNet that reads a text and writes on, over the functions of retentive.h; for one thread at a time.
 *
 * <p>It is Java, where the app is Kotlin, since so any JDK runs it: no Android is needed to test it.
 */
public final class RetNet implements AutoCloseable {
    static {
        System.loadLibrary("retentive_phone");
    }

    /** The least likely tokens, which are 5 % together, are not drawn. */
    private static final double TOP_P = 0.95;

    private long session;
    private boolean ready; // a text was read, after which a token can be drawn
    private final CharsetDecoder decoder =
            StandardCharsets.UTF_8
                    .newDecoder()
                    .onMalformedInput(CodingErrorAction.REPLACE)
                    .onUnmappableCharacter(CodingErrorAction.REPLACE);
    private byte[] rest = {}; // the first bytes of a letter whose others are still to come

    /** The model in a folder, read by so many threads; 0 for as many as there are cores. */
    public RetNet(String folder, int threads) throws IOException {
        session = open(utf8(folder), threads, new Random().nextLong());
    }

    /** Reads a text, after all that was read and written before. */
    public void read(String text) throws IOException {
        long[] ids = encode(session(), utf8(text));
        if (position() == 0 && end(session) >= 0) { // as every text in training begins
            long[] begun = new long[ids.length + 1];
            begun[0] = end(session);
            System.arraycopy(ids, 0, begun, 1, ids.length);
            ids = begun;
        }
        rest = new byte[0];
        if (ids.length > 0) take(ids);
    }

    /**
     * What one more token adds to the text, null where that ends: the likeliest at temperature 0, else a drawn one.
     * It may be empty, until a letter is whole.
     */
    public String write(double temperature) throws IOException {
        if (!ready) throw new IllegalStateException("read a text first");
        long id = sample(session(), temperature, TOP_P);
        if (id == end(session)) return null;
        String text = decode(text(session, id));
        take(new long[] {id});
        return text;
    }

    /** Tokens that were read and written. */
    public long position() {
        return position(session());
    }

    /** Bytes that all of these take: as many after a million tokens as after one. */
    public long stateBytes() {
        return bytes(session());
    }

    /** Keeps what was read in a file, which goes between phones, the command line and the server. */
    public void save(String file) throws IOException {
        save(session(), utf8(file));
    }

    /** Goes on from a file: read a text next. */
    public void load(String file) throws IOException {
        load(session(), utf8(file));
        ready = false;
    }

    /** Begins anew. */
    public void forget() {
        forget(session());
        ready = false;
    }

    @Override
    public void close() {
        if (session != 0) close(session);
        session = 0;
    }

    private void take(long[] ids) throws IOException {
        read(session(), ids);
        ready = true;
    }

    private String decode(byte[] more) {
        byte[] all = Arrays.copyOf(rest, rest.length + more.length);
        System.arraycopy(more, 0, all, rest.length, more.length);
        char[] letters = new char[all.length];
        ByteBuffer bytes = ByteBuffer.wrap(all);
        CharBuffer chars = CharBuffer.wrap(letters);
        decoder.reset().decode(bytes, chars, false);
        rest = Arrays.copyOfRange(all, bytes.position(), all.length);
        return new String(letters, 0, chars.position());
    }

    private long session() {
        if (session == 0) throw new IllegalStateException("the model was closed");
        return session;
    }

    private static byte[] utf8(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private static native long open(byte[] folder, int threads, long seed) throws IOException;

    private static native void close(long session);

    private static native long end(long session);

    private static native long position(long session);

    private static native long bytes(long session);

    private static native long[] encode(long session, byte[] text) throws IOException;

    private static native byte[] text(long session, long id);

    private static native void read(long session, long[] ids) throws IOException;

    private static native long sample(long session, double temperature, double topP) throws IOException;

    private static native void save(long session, byte[] file) throws IOException;

    private static native void load(long session, byte[] file) throws IOException;

    private static native void forget(long session);
}
