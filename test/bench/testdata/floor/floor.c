// floor sends back each byte that it receives. Before it sends back an 'x', it runs
// true and waits until that has exited. No program in a guest can be run sooner.
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

int main(int argc, char **argv) {
	static char *program[] = {"/usr/bin/true", NULL};
	struct sockaddr_in at = {.sin_family = AF_INET, .sin_port = htons(argc == 2 ? atoi(argv[1]) : 0)};
	int one = 1, listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || bind(listener, (struct sockaddr *)&at, sizeof at) || listen(listener, 1))
		return 1;
	for (;;) {
		int client = accept(listener, NULL, NULL);
		setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
		char byte;
		while (read(client, &byte, 1) == 1) {
			if (byte == 'x') {
				int status;
				pid_t pid = vfork();
				if (pid == 0) {
					execv(program[0], program);
					_exit(127);
				}
				if (pid < 0 || waitpid(pid, &status, 0) != pid || status != 0)
					return 1;
			}
			if (write(client, &byte, 1) != 1)
				break;
		}
		close(client);
	}
}
