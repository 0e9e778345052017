/*
 * Loaded into a pcscd of our own (LD_PRELOAD), for the sake of its driver of virtual readers. That driver listens on every address of the
 * host, and takes whoever connects first for the card in the reader. With this it listens on loopback, lets in processes of its own user,
 * and sends what it has to say at once (TCP_NODELAY: it writes a length and then a body).
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <sys/socket.h>
#include <unistd.h>

int bind(int fd, const struct sockaddr *address, socklen_t size)
{
    int (*next)(int, const struct sockaddr *, socklen_t) = dlsym(RTLD_NEXT, "bind");
    struct sockaddr_in local;

    if (address != NULL && address->sa_family == AF_INET && size >= sizeof local) {
        local = *(const struct sockaddr_in *)address;
        local.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        return next(fd, (const struct sockaddr *)&local, sizeof local);
    }
    return next(fd, address, size);
}

/* Whether the process at the other end is this user's: the kernel's table names the owner of each socket, that one's included. */
static int is_own(const struct sockaddr_in *peer, const struct sockaddr_in *here)
{
    FILE *table = fopen("/proc/net/tcp", "re");
    char line[256];
    int own = 0;

    if (table == NULL)
        return 0;
    while (!own && fgets(line, sizeof line, table) != NULL) {
        unsigned int from, from_port, to, to_port, uid;

        if (sscanf(line, " %*u: %8x:%4x %8x:%4x %*x %*x:%*x %*x:%*x %*x %u", &from, &from_port, &to, &to_port, &uid) == 5
            && from == peer->sin_addr.s_addr && from_port == ntohs(peer->sin_port)
            && to == here->sin_addr.s_addr && to_port == ntohs(here->sin_port))
            own = uid == geteuid();
    }
    fclose(table);
    return own;
}

int accept(int fd, struct sockaddr *restrict address, socklen_t *restrict size)
{
    int (*next)(int, struct sockaddr *, socklen_t *) = dlsym(RTLD_NEXT, "accept");
    struct sockaddr_in peer, here;
    socklen_t peer_size = sizeof peer, here_size = sizeof here;
    const int yes = 1;
    int connection = next(fd, address, size);

    if (connection < 0 || getpeername(connection, (struct sockaddr *)&peer, &peer_size) != 0 || peer.sin_family != AF_INET)
        return connection;
    if (getsockname(connection, (struct sockaddr *)&here, &here_size) != 0 || !is_own(&peer, &here)) {
        close(connection);
        errno = ECONNABORTED;
        return -1;
    }
    setsockopt(connection, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    return connection;
}
