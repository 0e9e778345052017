// peer server|client PORT CERT KEY CA VERSION NAME SIZE COUNT
// A server echoes; a client sends SIZE bytes, COUNT times, each time resuming the session before, and wants them back. A line a connection.
package main

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"os"
	"strconv"
)

func must(err error) {
	if err != nil {
		fmt.Printf("{\"error\": %q}\n", err.Error())
		os.Exit(1)
	}
}

func say(state tls.ConnectionState, bytes int64) {
	version := map[uint16]string{tls.VersionTLS12: "TLSv1.2", tls.VersionTLS13: "TLSv1.3"}[state.Version]
	fmt.Printf("{\"version\": %q, \"resumed\": %t, \"bytes\": %d}\n", version, state.DidResume, bytes)
}

func serve(address string, config *tls.Config) {
	listener, err := tls.Listen("tcp", address, config)
	must(err)
	for {
		accepted, err := listener.Accept()
		must(err)
		go func(connection *tls.Conn) {
			defer connection.Close()
			copied, err := io.Copy(connection, connection)
			if err != nil { // an end without close_notify is one, too
				fmt.Printf("{\"error\": %q}\n", err.Error())
				return
			}
			say(connection.ConnectionState(), copied)
		}(accepted.(*tls.Conn))
	}
}

func connect(address string, config *tls.Config, size int) {
	connection, err := tls.Dial("tcp", address, config)
	must(err)
	sent, got := bytes.Repeat([]byte("golang"), size/6+1)[:size], make([]byte, size)
	go func() {
		_, err := connection.Write(sent)
		must(err)
	}()
	_, err = io.ReadFull(connection, got)
	must(err)
	must(connection.CloseWrite())
	_, err = connection.Read(make([]byte, 1))
	if err != io.EOF { // with a close_notify; without one it is another error
		must(fmt.Errorf("the end: %v", err))
	}
	if !bytes.Equal(sent, got) {
		size = -1
	}
	say(connection.ConnectionState(), int64(size))
	must(connection.Close())
}

func main() {
	role, port, cert, key, ca, version, name := os.Args[1], os.Args[2], os.Args[3], os.Args[4], os.Args[5], os.Args[6], os.Args[7]
	size, err := strconv.Atoi(os.Args[8])
	must(err)
	count, err := strconv.Atoi(os.Args[9])
	must(err)
	pair, err := tls.LoadX509KeyPair(cert, key)
	must(err)
	pem, err := os.ReadFile(ca)
	must(err)
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(pem)
	number := map[string]uint16{"TLSv1.2": tls.VersionTLS12, "TLSv1.3": tls.VersionTLS13}[version]
	config := &tls.Config{
		Certificates: []tls.Certificate{pair}, MinVersion: number, MaxVersion: number, ServerName: name, RootCAs: pool,
		ClientCAs: pool, ClientAuth: tls.RequireAndVerifyClientCert, ClientSessionCache: tls.NewLRUClientSessionCache(8),
	}
	address := "127.0.0.1:" + port
	if role == "server" {
		serve(address, config)
	}
	for range make([]struct{}, count) {
		connect(address, config, size)
	}
}
