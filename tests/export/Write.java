import java.io.IOException;
import java.io.PrintStream;
import org.retentive.phone.RetNet;

/** What the tests ask of the app's Java and JNI: `Write MODEL PROMPT TOKENS STATE`, lines in UTF-8. */
public class Write {
    static String written(RetNet net, int tokens) throws IOException {
        StringBuilder text = new StringBuilder();
        for (int n = 0; n < tokens; n++) {
            String more = net.write(0);
            if (more == null) break;
            text.append(more);
        }
        return text.toString().replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r");
    }

    public static void main(String[] args) throws Exception {
        PrintStream out = new PrintStream(System.out, true, "UTF-8");
        int tokens = Integer.parseInt(args[2]);
        try (RetNet net = new RetNet(args[0], 1)) {
            try {
                net.write(0);
            } catch (IllegalStateException error) {
                out.println("refused " + error.getMessage());
            }
            net.read(args[1]);
            out.println("text " + written(net, tokens));
            long position = net.position(), bytes = net.stateBytes();
            net.save(args[3]);
            net.read("on");
            String first = written(net, tokens);
            net.forget();
            out.println("forgot " + net.position());
            net.load(args[3]);
            out.println("loaded " + (net.position() == position && net.stateBytes() == bytes && bytes > 0));
            net.read("on");
            out.println("same " + first.equals(written(net, tokens)));
            try {
                net.load(args[0]);
            } catch (IOException error) {
                out.println("refused " + error.getMessage());
            }
            net.forget();
            net.read("a");
            long before = net.position();
            String drawn = net.write(1.5); // by chance, the end of text among the rest
            out.println("drawn " + (net.position() - before == (drawn == null ? 0 : 1)));
        }
        try {
            new RetNet(args[0] + "-none", 1);
        } catch (IOException error) {
            out.println("refused " + error.getMessage());
        }
    }
}
