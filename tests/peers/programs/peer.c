/* peer PORT CERT KEY CA NAME SIZE COUNT: an mbedTLS 2.28 client (TLS 1.2). It sends SIZE bytes, COUNT times, each time resuming the session
   before, and wants them back. A line a connection. */
#include <mbedtls/ctr_drbg.h>
#include <mbedtls/entropy.h>
#include <mbedtls/net_sockets.h>
#include <mbedtls/ssl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static mbedtls_entropy_context entropy;
static mbedtls_ctr_drbg_context random_source;

static void must(int result, const char *what)
{
    if (result < 0) {
        printf("{\"error\": \"%s: -0x%04x\"}\n", what, -result);
        exit(1);
    }
}

int main(int argc, char **argv)
{
    mbedtls_x509_crt own, authority;
    mbedtls_pk_context key;
    mbedtls_ssl_config config;
    mbedtls_ssl_session session;
    if (argc != 8)
        return 2;
    size_t size = strtoul(argv[6], NULL, 10);
    unsigned char *sent = malloc(size), *got = malloc(size);
    for (size_t at = 0; at < size; at++)
        sent[at] = (unsigned char) (at * 7);
    mbedtls_entropy_init(&entropy);
    mbedtls_ctr_drbg_init(&random_source);
    must(mbedtls_ctr_drbg_seed(&random_source, mbedtls_entropy_func, &entropy, NULL, 0), "seed");
    mbedtls_x509_crt_init(&own);
    mbedtls_x509_crt_init(&authority);
    mbedtls_pk_init(&key);
    mbedtls_ssl_session_init(&session);
    must(mbedtls_x509_crt_parse_file(&own, argv[2]), "certificate");
    must(mbedtls_pk_parse_keyfile(&key, argv[3], NULL), "key");
    must(mbedtls_x509_crt_parse_file(&authority, argv[4]), "authority");
    mbedtls_ssl_config_init(&config);
    must(mbedtls_ssl_config_defaults(&config, MBEDTLS_SSL_IS_CLIENT, MBEDTLS_SSL_TRANSPORT_STREAM, MBEDTLS_SSL_PRESET_DEFAULT), "config");
    mbedtls_ssl_conf_authmode(&config, MBEDTLS_SSL_VERIFY_REQUIRED);
    mbedtls_ssl_conf_ca_chain(&config, &authority, NULL);
    mbedtls_ssl_conf_rng(&config, mbedtls_ctr_drbg_random, &random_source);
    must(mbedtls_ssl_conf_own_cert(&config, &own, &key), "own certificate");
    for (int number = 0; number < atoi(argv[7]); number++) {
        mbedtls_net_context net;
        mbedtls_ssl_context ssl;
        mbedtls_net_init(&net);
        mbedtls_ssl_init(&ssl);
        must(mbedtls_net_connect(&net, "127.0.0.1", argv[1], MBEDTLS_NET_PROTO_TCP), "connect");
        must(mbedtls_ssl_setup(&ssl, &config), "setup");
        must(mbedtls_ssl_set_hostname(&ssl, argv[5]), "name");
        if (number > 0)
            must(mbedtls_ssl_set_session(&ssl, &session), "session");
        mbedtls_ssl_set_bio(&ssl, &net, mbedtls_net_send, mbedtls_net_recv, NULL);
        must(mbedtls_ssl_handshake(&ssl), "handshake");
        mbedtls_ssl_session now;
        mbedtls_ssl_session_init(&now);
        must(mbedtls_ssl_get_session(&ssl, &now), "session");
        int resumed = number > 0 && memcmp(now.master, session.master, sizeof now.master) == 0;
        mbedtls_ssl_session_free(&session);
        session = now;
        /* A piece at a time: it has one thread, and the other side gives back what it gets. */
        for (size_t at = 0; at < size;) {
            size_t piece = size - at < 16384 ? size - at : 16384;
            for (size_t done = 0; done < piece;) {
                int wrote = mbedtls_ssl_write(&ssl, sent + at + done, piece - done);
                must(wrote, "write");
                done += (size_t) wrote;
            }
            for (size_t done = 0; done < piece;) {
                int read = mbedtls_ssl_read(&ssl, got + at + done, piece - done);
                must(read == 0 ? -1 : read, "read");
                done += (size_t) read;
            }
            at += piece;
        }
        must(mbedtls_ssl_close_notify(&ssl), "close");
        unsigned char rest;
        int end = mbedtls_ssl_read(&ssl, &rest, 1);
        if (end != MBEDTLS_ERR_SSL_PEER_CLOSE_NOTIFY && end != 0)
            must(end < 0 ? end : -1, "end");
        printf("{\"version\": \"%s\", \"resumed\": %s, \"bytes\": %ld}\n", mbedtls_ssl_get_version(&ssl), resumed ? "true" : "false",
               memcmp(sent, got, size) == 0 ? (long) size : -1L);
        fflush(stdout);
        mbedtls_ssl_free(&ssl);
        mbedtls_net_free(&net);
    }
    return 0;
}
