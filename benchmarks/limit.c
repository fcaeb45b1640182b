/* What this machine allows: a server that does nothing but answer, from one thread.
 *
 *   limit FILE...
 *
 * Listens on a free port of loopback, prints `ready PORT`, and answers any request whose first line holds
 * the name of a FILE with that file, from memory: finished header and body in one sendmsg up to COPY_BYTES,
 * above that the body by sendfile from a file in memory. No parsing, no limits, no time-outs, no care:
 * it is there to be compared with, not to be used.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { MOST_FILES = 16, MOST_CONNECTIONS = 4096, REQUEST_BYTES = 16 * 1024 };
enum { COPY_BYTES = 2 * 1024 * 1024, STEP_BYTES = 1024 * 1024, TURN_BYTES = 4 * 1024 * 1024 };

struct file {
    const char *name;
    char *bytes;
    size_t size, head_length;
    int fd;
    char head[128];
};

struct connection {
    const struct file *file; /* NULL: waits for a request */
    size_t position;         /* of head and body */
    int closes;
};

static struct file files[MOST_FILES];
static struct connection connections[MOST_CONNECTIONS]; /* by descriptor */
static int file_count, poller, listener;

static void check(int failed, const char *what) {
    if (failed) {
        perror(what);
        exit(1);
    }
}

static void load(const char *path) {
    struct file *file = &files[file_count++];
    struct stat status;
    int source = open(path, O_RDONLY);
    check(file_count == MOST_FILES || source < 0 || fstat(source, &status) < 0, path);
    file->name = strrchr(path, '/') ? strrchr(path, '/') + 1 : path;
    file->size = (size_t)status.st_size;
    file->bytes = malloc(file->size);
    check(read(source, file->bytes, file->size) != status.st_size, path);
    file->fd = memfd_create(file->name, MFD_CLOEXEC);
    check(write(file->fd, file->bytes, file->size) != status.st_size, "memfd");
    close(source);
    file->head_length = (size_t)snprintf(
        file->head, sizeof file->head, "HTTP/1.1 200 OK\r\nContent-Length: %zu\r\n\r\n", file->size);
}

static void wait_for(int fd, unsigned events, int operation) {
    struct epoll_event event = {.events = events, .data.fd = fd};
    check(epoll_ctl(poller, operation, fd, &event) < 0, "epoll_ctl");
}

static void accept_all(void) {
    int fd;
    while ((fd = accept4(listener, NULL, NULL, SOCK_NONBLOCK)) >= 0) {
        check(fd >= MOST_CONNECTIONS, "too many connections");
        connections[fd] = (struct connection){0};
        wait_for(fd, EPOLLIN, EPOLL_CTL_ADD);
    }
}

/* Read a request, which comes in one piece, if it is there; tell whether the connection goes on. */
static int receive(int fd, struct connection *connection) {
    char request[REQUEST_BYTES + 1];
    ssize_t length = recv(fd, request, REQUEST_BYTES, 0);
    if (length < 0 && errno == EAGAIN) /* the event was for a connection that had this number before */
        return 1;
    if (length <= 0)
        return 0;
    request[length] = 0;
    connection->closes = strstr(request, "Connection: close") != NULL;
    char *line_end = strchr(request, '\r');
    if (line_end)
        *line_end = 0;
    for (int i = 0; i < file_count; i++)
        if (strstr(request, files[i].name))
            connection->file = &files[i];
    connection->position = 0;
    return connection->file != NULL;
}

static ssize_t send_some(int fd, const struct connection *connection) {
    const struct file *file = connection->file;
    size_t position = connection->position, head = file->head_length;
    if (file->size > COPY_BYTES && position < head)
        return send(fd, file->head + position, head - position, MSG_MORE);
    if (file->size > COPY_BYTES) {
        off_t offset = (off_t)(position - head);
        size_t left = file->size - (size_t)offset;
        return sendfile(fd, file->fd, &offset, left < STEP_BYTES ? left : STEP_BYTES);
    }
    size_t head_left = position < head ? head - position : 0;
    size_t body_at = position < head ? 0 : position - head;
    struct iovec parts[2] = {
        {(void *)(file->head + head - head_left), head_left},
        {file->bytes + body_at, file->size - body_at},
    };
    struct msghdr message = {.msg_iov = parts, .msg_iovlen = 2};
    return sendmsg(fd, &message, 0);
}

/* Send a turn's worth; tell whether the connection goes on. */
static int answer(int fd, struct connection *connection, int waited) {
    size_t end = connection->file->head_length + connection->file->size, sent_now = 0;
    while (connection->position < end && sent_now < TURN_BYTES) {
        ssize_t sent = send_some(fd, connection);
        if (sent < 0 && errno == EAGAIN)
            break;
        if (sent <= 0)
            return 0;
        connection->position += (size_t)sent;
        sent_now += (size_t)sent;
    }
    int is_done = connection->position == end;
    if (is_done)
        connection->file = NULL;
    if (is_done && connection->closes)
        return 0;
    if (is_done == waited)
        wait_for(fd, is_done ? EPOLLIN : EPOLLOUT, EPOLL_CTL_MOD);
    return 1;
}

int main(int count, char **arguments) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof address;
    struct epoll_event events[512];
    int one = 1;
    signal(SIGPIPE, SIG_IGN); /* sendfile has no flag against it */
    for (int i = 1; i < count; i++)
        load(arguments[i]);
    listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    check(setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one) < 0, "setsockopt");
    check(bind(listener, (struct sockaddr *)&address, length) < 0 || listen(listener, 1024) < 0, "listen");
    check(getsockname(listener, (struct sockaddr *)&address, &length) < 0, "getsockname");
    poller = epoll_create1(EPOLL_CLOEXEC);
    wait_for(listener, EPOLLIN, EPOLL_CTL_ADD);
    printf("ready %d\n", ntohs(address.sin_port));
    fflush(stdout);
    for (;;) {
        int ready = epoll_wait(poller, events, 512, -1);
        for (int i = 0; i < ready; i++) {
            int fd = events[i].data.fd;
            struct connection *connection = &connections[fd];
            if (fd == listener)
                accept_all();
            else if (!connection->file && !receive(fd, connection))
                close(fd);
            else if (connection->file && !answer(fd, connection, events[i].events & EPOLLOUT ? 1 : 0))
                close(fd);
        }
    }
}
