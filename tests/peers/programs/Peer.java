// Peer server|client PORT PKCS12 CA VERSION NAME SIZE COUNT
// A server echoes; a client sends SIZE bytes, COUNT times, each time resuming the session before, and wants them back. A line a connection.
import java.io.FileInputStream;
import java.io.InputStream;
import java.io.OutputStream;
import java.net.InetAddress;
import java.security.KeyStore;
import java.security.cert.CertificateFactory;
import java.util.Arrays;
import java.util.List;
import javax.net.ssl.*;

public class Peer {
    static final char[] PASSWORD = "password".toCharArray();

    static void say(SSLSocket socket, boolean resumed, long bytes) {
        System.out.printf("{\"version\": \"%s\", \"resumed\": %b, \"bytes\": %d}%n", socket.getSession().getProtocol(), resumed, bytes);
        System.out.flush();
    }

    static void fail(Exception error) {
        System.out.printf("{\"error\": \"%s\"}%n", error.toString().replace('"', '\''));
        System.out.flush();
    }

    static void echo(SSLSocket socket) {
        try (socket) {
            InputStream in = socket.getInputStream();
            OutputStream out = socket.getOutputStream();
            byte[] buffer = new byte[65536];
            long total = 0;
            for (int got; (got = in.read(buffer)) >= 0; total += got) out.write(buffer, 0, got);
            say(socket, false, total);
        } catch (Exception error) {
            fail(error);
        }
    }

    static void connect(SSLContext context, int port, String name, String version, int size, long began) throws Exception {
        SSLSocket socket = (SSLSocket) context.getSocketFactory().createSocket(
            new java.net.Socket(InetAddress.getLoopbackAddress(), port), name, port, true);
        socket.setEnabledProtocols(new String[] {version});
        socket.startHandshake();
        boolean resumed = socket.getSession().getCreationTime() < began;
        byte[] sent = new byte[size];
        for (int at = 0; at < size; at++) sent[at] = (byte) ("java".charAt(at % 4));
        OutputStream out = socket.getOutputStream();
        Thread writer = new Thread(() -> {
            try {
                out.write(sent);
                out.flush();
            } catch (Exception error) {
                fail(error);
            }
        });
        writer.start();
        byte[] got = socket.getInputStream().readNBytes(size);
        writer.join();
        socket.shutdownOutput();
        int end = socket.getInputStream().read(); // an end without close_notify is an exception
        say(socket, resumed, end == -1 && Arrays.equals(sent, got) ? size : -1);
        socket.close();
    }

    public static void main(String[] words) throws Exception {
        int port = Integer.parseInt(words[1]);
        KeyStore own = KeyStore.getInstance("PKCS12");
        own.load(new FileInputStream(words[2]), PASSWORD);
        KeyStore trusted = KeyStore.getInstance("PKCS12");
        trusted.load(null, null);
        trusted.setCertificateEntry("ca", CertificateFactory.getInstance("X.509").generateCertificate(new FileInputStream(words[3])));
        KeyManagerFactory keys = KeyManagerFactory.getInstance("PKIX");
        keys.init(own, PASSWORD);
        TrustManagerFactory trust = TrustManagerFactory.getInstance("PKIX");
        trust.init(trusted);
        SSLContext context = SSLContext.getInstance("TLS");
        context.init(keys.getKeyManagers(), trust.getTrustManagers(), null);
        if (words[0].equals("server")) {
            SSLServerSocket listener = (SSLServerSocket) context.getServerSocketFactory().createServerSocket(
                port, 8, InetAddress.getLoopbackAddress());
            listener.setEnabledProtocols(new String[] {words[4]});
            listener.setNeedClientAuth(true);
            while (true) {
                SSLSocket socket = (SSLSocket) listener.accept();
                new Thread(() -> echo(socket)).start();
            }
        }
        for (int left = Integer.parseInt(words[7]); left > 0; left--) {
            long began = System.currentTimeMillis();
            Thread.sleep(20);
            connect(context, port, words[5], words[4], Integer.parseInt(words[6]), began);
        }
    }
}
