"""A site on this machine with one picture, or with whatever a test wants it to answer."""

import socket
import threading


class Site:
    """A site on this machine that answers every connection with the same bytes."""

    def __init__(self, answer, *, stays_open=False):
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.name = f"pictures.example:{self.port}"
        self.asked = []
        self._answer = answer
        self._stays_open = stays_open
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def __str__(self):
        return f"http://127.0.0.1:{self.port}"

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(65536))
                connection.sendall(self._answer)
                if self._stays_open:
                    self._ended.wait(10)

    def close(self):
        self._ended.set()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
