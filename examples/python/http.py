#!/usr/sbin/nbdkit python
"""A read-only disk that is a file on an HTTP server. url=URL is the file; the server must know range requests.

Only what is read is fetched, with one connection for each client, which is made again when the server has dropped it.
"""

import errno
import http.client
import urllib.parse

import nbdkit

API_VERSION = 2

url = None


def config(key, value):
    global url
    if key != "url":
        raise ValueError("unknown parameter: " + key)
    url = urllib.parse.urlsplit(value)
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError("url= must be http://HOST/PATH or https://HOST/PATH, and not " + value)


def config_complete():
    if url is None:
        raise ValueError("the parameter url= is missing")


# While one client waits for the network, others need not.
def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


class Client:
    def __init__(self):
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        self.connection = kinds[url.scheme](url.hostname, url.port, timeout=60)
        self.path = urllib.parse.urlunsplit(("", "", url.path or "/", url.query, ""))
        response = self.request("HEAD", {})
        response.read()
        if response.status != 200:
            raise OSError(errno.EIO, "%s: %d %s" % (url.geturl(), response.status, response.reason))
        self.size = int(response.getheader("Content-Length"))

    def request(self, method, headers):
        for attempt in ("first", "last"):
            try:
                self.connection.request(method, self.path, headers=headers)
                return self.connection.getresponse()
            except (http.client.HTTPException, ConnectionError):
                self.connection.close()
                if attempt == "last":
                    raise

    def read(self, buf, offset):
        end = offset + len(buf) - 1
        response = self.request("GET", {"Range": "bytes=%d-%d" % (offset, end)})
        if response.status != 206:
            self.connection.close()
            raise OSError(errno.EIO, "the server does not know ranges: %d %s" % (response.status, response.reason))
        done = 0
        while done < len(buf):
            length = response.readinto(buf[done:])
            if not length:
                self.connection.close()
                raise OSError(errno.EIO, "the server sent %d bytes instead of %d" % (done, len(buf)))
            done += length
        response.read()


def open(readonly):
    return Client()


def close(client):
    client.connection.close()


def get_size(client):
    return client.size


def can_multi_conn(client):
    return True


def pread(client, buf, offset, flags):
    client.read(buf, offset)
