// Tests the page that the link in a password reset mail opens. WRENN_PASSWORD is the new
// password.
import {expect, test} from './page.js'

const {WRENN_LINK: link, WRENN_PASSWORD: password} = process.env

test('a link sets a new password', async ({page}) => {
	await page.goto(link)
	await page.getByLabel('New password').fill(password)
	await page.getByLabel('Repeat the password').fill('not ' + password)
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('not the same')
	await page.getByLabel('New password').fill('short')
	await page.getByLabel('Repeat the password').fill('short')
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('password')
	await page.getByLabel('New password').fill(password)
	await page.getByLabel('Repeat the password').fill(password)
	await page.getByRole('button').click()
	await expect(page.getByRole('status')).toContainText('The new password is set')
})

test('an incomplete link is refused, and no other page can frame this one', async ({page, baseURL}) => {
	await page.goto('/reset-password')
	await page.getByLabel('New password').fill(password)
	await page.getByLabel('Repeat the password').fill(password)
	await page.getByRole('button').click()
	await expect(page.getByRole('alert')).toContainText('incomplete')
	const headers = (await page.request.get('/verify')).headers()
	expect(headers['content-security-policy']).toContain("frame-ancestors 'none'")
	expect(headers['referrer-policy']).toBe('no-referrer')
	expect(new URL(link).origin).toBe(baseURL)
})
