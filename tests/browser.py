"""A real Chromium for the tests, where the machine has one."""
import shutil
import subprocess

FLAGS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
         "--disable-sync")


def find_browser() -> str | None:
    "A browser on PATH, if playwright's driver can run here; its wheel wants libatomic1 of the system."
    from playwright._impl._driver import compute_driver_executable
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((b for n in names if (b := shutil.which(n))), None)
    driver = subprocess.run([compute_driver_executable()[0], "--version"], capture_output=True, check=False)
    return found if driver.returncode == 0 else None


BROWSER = find_browser()
