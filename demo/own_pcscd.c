/*
 * Loaded into a pcscd of our own (LD_PRELOAD).
 *
 * Its driver of virtual readers listens on every address of the host, and takes whoever connects first for the card in the reader. With this
 * it listens on loopback, lets in processes of its own user, and sends what it has to say at once (TCP_NODELAY: it writes a length and then
 * a body). What pcscd keeps in /run/pcscd goes to the folder in $OWN_PCSCD_RUN, and there it looks for drivers of USB readers, too, of which
 * it finds none: that folder and those readers are the system's pcscd's.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
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

static const char *const SYSTEMS[] = {"/run/pcscd", "/usr/lib/pcsc/drivers"};

/* The path that is used in the place of ``path``; ``space`` may hold it. */
static const char *own_path(const char *path, char space[PATH_MAX])
{
    const char *folder = getenv("OWN_PCSCD_RUN");

    for (size_t i = 0; folder != NULL && i < sizeof SYSTEMS / sizeof SYSTEMS[0]; i++) {
        size_t length = strlen(SYSTEMS[i]);

        if (strncmp(path, SYSTEMS[i], length) == 0 && (path[length] == '/' || path[length] == '\0')) {
            if (snprintf(space, PATH_MAX, "%s%s", folder, path + length) >= PATH_MAX)
                abort();
            return space;
        }
    }
    return path;
}

DIR *opendir(const char *path)
{
    DIR *(*next)(const char *) = dlsym(RTLD_NEXT, "opendir");
    char space[PATH_MAX];

    return next(own_path(path, space));
}

int mkdir(const char *path, mode_t mode)
{
    int (*next)(const char *, mode_t) = dlsym(RTLD_NEXT, "mkdir");
    char space[PATH_MAX];

    return next(own_path(path, space), mode);
}

int chmod(const char *path, mode_t mode)
{
    int (*next)(const char *, mode_t) = dlsym(RTLD_NEXT, "chmod");
    char space[PATH_MAX];

    return next(own_path(path, space), mode);
}

int remove(const char *path)
{
    int (*next)(const char *) = dlsym(RTLD_NEXT, "remove");
    char space[PATH_MAX];

    return next(own_path(path, space));
}

int open(const char *path, int flags, ...)
{
    int (*next)(const char *, int, ...) = dlsym(RTLD_NEXT, "open");
    char space[PATH_MAX];
    mode_t mode = 0;

    if (flags & (O_CREAT | O_TMPFILE)) {
        va_list rest;

        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    return next(own_path(path, space), flags, mode);
}

FILE *fopen(const char *restrict path, const char *restrict mode)
{
    FILE *(*next)(const char *, const char *) = dlsym(RTLD_NEXT, "fopen");
    char space[PATH_MAX];

    return next(own_path(path, space), mode);
}

int stat(const char *restrict path, struct stat *restrict found)
{
    int (*next)(const char *, struct stat *) = dlsym(RTLD_NEXT, "stat");
    char space[PATH_MAX];

    return next(own_path(path, space), found);
}
